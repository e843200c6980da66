#pragma once

#include "core/eviction/lru.h"

namespace expertflow {

// No cache: nothing that is ready outlives the plan before which it is dropped (core/planning.h).
struct OnDemand : Lru {};

}  // namespace expertflow
