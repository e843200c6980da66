#pragma once

#include "core/eviction/policy.h"

namespace expertflow {

// The least soon needed goes first, as NeedModel (eviction/need_model.h) foresees it from what was
// routed; last go those that are predicted inside the current horizon.
struct PredictedNeed {
  static constexpr int64_t kRankOfZero = int64_t{1} << 40;  // makes ranks of residents positive

  EXPERTFLOW_HD static int64_t KeyOnUse(const EvictionParams&, int64_t, Tick) { return 0; }
  EXPERTFLOW_HD static int64_t Rank(const EvictionParams& params, const SlotTableView& table,
                                    int32_t slot, Tick now) {
    const int64_t key = table.slot_key[slot];
    if (key < 0) return key;
    const int64_t rank = kRankOfZero + params.expert_score[Index(table.slot_expert[slot])];
    return table.slot_predicted[slot] >= now ? rank + kProtected : rank;
  }
};

}  // namespace expertflow
