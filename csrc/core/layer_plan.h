#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "core/ids.h"
#include "core/plan.h"

namespace expertflow {

// What the planner kernel takes and gives: plain data in device memory and mapped host memory.

constexpr int32_t kMaxRoutedIds = 512;  // tokens * k of a decode step

enum class LayerPlanStatus : int32_t {
  kPlanned,
  // More misses than slots to take, because transfers hold them or the batch is large. The table is
  // as it was but for the keys of a policy that learns, and so is the tick: plan on the host, or
  // wait for transfers and launch again.
  kNeedsWaves,
  kBadExpertId,  // an id that the layer does not have; the table is as it was
};

// A `Plan` of one wave. What the header and the first `num_rows` rows do not hold is undefined.
struct LayerPlan {
  uint64_t sequence;  // number of the launch that wrote the plan, from 1; in host memory it is
                      // written after all else
  Tick tick;
  LayerPlanStatus status;
  int32_t layer;
  int32_t num_rows;  // 0 unless planned
  int32_t num_hits;
  int32_t num_loading;
  PlanRow rows[kMaxRoutedIds];
};

// Lives in device memory, so that a captured graph plans at a new tick with every replay.
struct alignas(16) PlanClock {
  Tick now;           // of the last plan
  uint64_t sequence;  // of the last launch
};

// Expert ids as the router gives them, [num_tokens * k], in device memory.
struct RoutedIds {
  const int64_t* int64;  // or nullptr if they are 32 bits wide
  const int32_t* int32;
  int32_t count;  // at most kMaxRoutedIds
};

// An id below zero is as far out of range as one of 32 bits that is not.
EXPERTFLOW_HD inline uint64_t IdAt(const RoutedIds& ids, int32_t i) {
  if (ids.int64 != nullptr) return static_cast<uint64_t>(ids.int64[i]);
  return static_cast<uint32_t>(ids.int32[i]);
}

// Who moves the misses.
enum class MissFetch : int32_t {
  kTransfer,    // whoever publishes the slots; until then they are in flight
  kSameStream,  // a kernel that comes before the next plan: for that one they are ready
};

struct LayerPlanRequest {
  int32_t layer;
  RoutedIds ids;
  MissFetch fetch;
  PlanClock* clock;
  LayerPlan* plan;       // in device memory
  LayerPlan* host_plan;  // in mapped host memory, or nullptr
};

}  // namespace expertflow
