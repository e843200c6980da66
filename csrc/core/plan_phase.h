#pragma once

#include <cstdint>

namespace expertflow {

// What ends where the planner of a block calls Block::Mark (core/block_planner.h).
enum class PlanPhase : int32_t {
  kPrepared,  // before the wait for the previous kernel
  kReleased,  // the wait
  kRouted,    // ids are known, with them scores, and the ranks of slots of other layers' experts
  kRanked,    // all slots are ranked
  kCounted,   // hits and misses are known
  kSelected,  // victims are known
  kDone,      // all stores are on their way
};
constexpr int32_t kNumPlanPhases = 7;

}  // namespace expertflow
