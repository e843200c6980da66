#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/layer_plan.h"
#include "core/plan_phase.h"
#include "core/planning.h"

namespace expertflow {

// Enqueues the planner kernel with a block that takes the time. Adds to each of
// `phase_cycles` [kNumPlanPhases], in device memory, the clock cycles from the end of the phase
// before to the end of that phase, each of the last warp; what the first phase gets means nothing.
// The stamps themselves cost some 10 cycles each, and a barrier at the end.
void LaunchTimedPlanLayer(const PlanningView& planning, const LayerPlanRequest& request,
                          int64_t* phase_cycles, cudaStream_t stream);

// Enqueues a kernel after which the need model records the last step of `layer` once more, as a new
// one, and learns again.
void LaunchLearnAgain(const PlanningView& planning, int32_t layer, cudaStream_t stream);

}  // namespace expertflow
