#pragma once

#include "core/eviction/policy.h"

namespace expertflow {

// Least recently used.
struct Lru {
  static constexpr int32_t kTieBits = 0;

  EXPERTFLOW_HD static int64_t KeyOnUse(const EvictionParams&, int64_t, Tick now) { return now; }
  EXPERTFLOW_HD static bool IsProtected(const EvictionParams&, const SlotUse&, Tick) {
    return false;
  }
  EXPERTFLOW_HD static int64_t Origin(const EvictionParams&, Tick now) { return now; }
};

}  // namespace expertflow
