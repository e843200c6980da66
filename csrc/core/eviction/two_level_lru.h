#pragma once

#include "core/eviction/policy.h"

namespace expertflow {

// The paper's two-level LRU: experts used within the last token, or predicted inside the current
// horizon, are protected; the others go first. Each level is an LRU of its own.
struct TwoLevelLru {
  static constexpr int32_t kTieBits = 0;

  EXPERTFLOW_HD static int64_t KeyOnUse(const EvictionParams&, int64_t, Tick now) { return now; }
  EXPERTFLOW_HD static bool IsProtected(const EvictionParams& params, const SlotUse& slot,
                                        Tick now) {
    const int64_t last_use = slot.key;
    const bool predicted = slot.predicted >= now;
    const bool just_used = (last_use >= 0) & (last_use > now - params.protected_ticks);
    return predicted | just_used;
  }
  EXPERTFLOW_HD static int64_t Origin(const EvictionParams&, Tick now) { return now; }
};

}  // namespace expertflow
