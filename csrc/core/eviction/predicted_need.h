#pragma once

#include "core/eviction/policy.h"

namespace expertflow {

// The least soon needed goes first, as NeedModel (eviction/need_model.h) foresees it from what was
// routed; last go those that are predicted inside the current horizon.
//
// Keys are scores. They change with every plan of their layer, for all its experts: RecordScore.
struct PredictedNeed {
  static constexpr int64_t kKeyOfZero = int64_t{1} << 40;  // keys of used experts are positive
  static constexpr int32_t kTieBits = 12;                  // scores lie within 2^17

  EXPERTFLOW_HD static int64_t KeyOf(int32_t score) { return kKeyOfZero + score; }

  EXPERTFLOW_HD static void RecordScore(const SlotTableView& table, ExpertIndex expert,
                                        int32_t score) {
    const int64_t key = KeyOf(score);
    table.expert_key[Index(expert)] = key;
    const SlotId slot = table.expert_slot[Index(expert)];
    // A key below zero stays: a long prompt left the expert there.
    if (slot != SlotId::kNone && table.slot_key[Index(slot)] >= 0) {
      table.slot_key[Index(slot)] = key;
    }
  }

  EXPERTFLOW_HD static int64_t KeyOnUse(const EvictionParams&, int64_t key, Tick) {
    return key == kNeverUsed ? kKeyOfZero : key;  // prefetched before its layer was ever planned
  }

  EXPERTFLOW_HD static bool IsProtected(const EvictionParams&, const SlotUse& slot, Tick now) {
    return (slot.key >= 0) & (slot.predicted >= now);
  }

  EXPERTFLOW_HD static int64_t Origin(const EvictionParams&, Tick) { return kKeyOfZero; }
};

}  // namespace expertflow
