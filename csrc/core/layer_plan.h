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
  // as it was, and so is the tick: plan on the host, or wait for transfers.
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
struct PlanClock {
  Tick now;           // of the last plan
  uint64_t sequence;  // of the last launch
};

struct LayerPlanRequest {
  int32_t layer;
  int32_t num_ids;           // num_tokens * k, at most kMaxRoutedIds
  const int64_t* ids_int64;  // [num_ids] routed experts, or nullptr if they are int32
  const int32_t* ids_int32;  // [num_ids], or nullptr
  PlanClock* clock;
  LayerPlan* plan;       // in device memory
  LayerPlan* host_plan;  // in mapped host memory, or nullptr

  EXPERTFLOW_HD int64_t Id(int32_t place) const {
    return ids_int64 != nullptr ? ids_int64[place] : ids_int32[place];
  }
};

}  // namespace expertflow
