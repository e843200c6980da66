#pragma once

#include "core/eviction/policy.h"

namespace expertflow {

// Least recently used.
struct Lru {
  EXPERTFLOW_HD static int64_t KeyOnUse(const EvictionParams&, int64_t, Tick now) { return now; }
  EXPERTFLOW_HD static int64_t Rank(const EvictionParams&, const SlotUse& slot, Tick) {
    return slot.key;
  }
  EXPERTFLOW_HD static int64_t Origin(const EvictionParams&, Tick now) { return now; }
};

}  // namespace expertflow
