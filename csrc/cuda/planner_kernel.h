#pragma once

#include <cuda_runtime_api.h>

#include "core/layer_plan.h"
#include "core/planning.h"

namespace expertflow {

// Enqueues the plan of one layer of a decode step: one launch of one block, which may be captured
// in a CUDA graph. It decides as Planner::PlanLayer does for at most kMaxDecodeTokens tokens, takes
// the next tick from the clock, changes the table and the statistics, and writes the plan to device
// memory and, if asked to, to mapped host memory, where the host may poll its sequence number.
// Plans that need waves are left to the host, see LayerPlanStatus.
//
// The launch may start while the kernel before it ends, but uses nothing of it before.
//
// All pointers of `planning` are to device memory that nothing else changes while the kernel runs.
// Throws std::invalid_argument for a layer, a number of ids or of experts that it cannot plan, or
// for the policy predicted_need without a need model, and CudaError if the launch fails.
void LaunchPlanLayer(const PlanningView& planning, const LayerPlanRequest& request,
                     cudaStream_t stream);

// Enqueues what the policy predicted_need records of the layer's last plan and learns from it,
// once, however often it is launched, and the sums that make the next layer's plan short: one
// launch of one block. Must come behind every plan of that policy and before the next of any layer,
// on the same stream or ordered by events: what it does not record is lost. Throws as
// LaunchPlanLayer does.
void LaunchLearnNeeds(const PlanningView& planning, int32_t layer, cudaStream_t stream);

}  // namespace expertflow
