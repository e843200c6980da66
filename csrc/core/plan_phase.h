#pragma once

#include <cstdint>

namespace expertflow {

// What ends where the planner of a block calls Block::Mark (core/block_planner.h).
enum class PlanPhase : int32_t {
  kPrepared,  // before the wait for the previous kernel
  kReleased,  // the wait
  kRouted,    // ids are known, and the ranks of slots that hold other layers' experts
  kScored,    // what the policy learns of is scored
  kRanked,    // all slots are ranked
  kCounted,   // hits and misses are known
  kSelected,  // victims are known
  kDone,      // all stores are on their way
};
constexpr int32_t kNumPlanPhases = 8;

}  // namespace expertflow
