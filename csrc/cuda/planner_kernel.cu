#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/block_planner.h"
#include "cuda/cuda_block.h"
#include "cuda/overlapped_launch.h"
#include "cuda/planner_kernel.h"

namespace expertflow {
namespace {

template <class Policy>
__global__ void __launch_bounds__(CudaBlock::kMaxThreads)
    PlanLayerKernel(const PlanningView planning, const LayerPlanRequest request) {
  __shared__ BlockPlannerShared shared;
  extern __shared__ int32_t first_of_expert[];
  CudaBlock block;
  BlockPlanner<Policy, CudaBlock>(block, shared, first_of_expert, planning, request).Run();
}

void Check(bool holds, const char* what, int64_t value, int64_t limit) {
  if (holds) return;
  throw std::invalid_argument(std::string("the planner kernel cannot plan ") + what + " " +
                              std::to_string(value) + ": the limit is " + std::to_string(limit));
}

// Few slots for each thread, so that they are read at once, a thread for every id, and enough warps
// to find a token's victims in one pass.
int32_t NumThreads(const PlanningView& planning, const LayerPlanRequest& request) {
  constexpr int32_t kMinWarps = 8;
  const SlotRange range = RangeOf(planning, request.layer);
  constexpr int32_t kPerTile = OwnSlots<Lru, CudaBlock>::kPerTile;
  const int32_t wanted =
      std::max((range.end - range.begin + kPerTile - 1) / kPerTile, request.ids.count);
  const int32_t num_warps = (wanted + CudaBlock::kWarpSize - 1) / CudaBlock::kWarpSize;
  return std::clamp(num_warps, kMinWarps, kMaxBlockWarps) * CudaBlock::kWarpSize;
}

}  // namespace

void LaunchPlanLayer(const PlanningView& planning, const LayerPlanRequest& request,
                     cudaStream_t stream) {
  constexpr size_t kMaxDynamicBytes = 48 * 1024 - sizeof(BlockPlannerShared);
  const size_t first_of_expert_bytes =
      sizeof(int32_t) * (static_cast<size_t>(planning.table.num_experts) + 1);
  Check(request.layer >= 0 && request.layer < planning.table.num_layers, "layer", request.layer,
        planning.table.num_layers - 1);
  Check(request.ids.count >= 0 && request.ids.count <= kMaxRoutedIds, "routed ids",
        request.ids.count, kMaxRoutedIds);
  Check(first_of_expert_bytes <= kMaxDynamicBytes, "experts per layer", planning.table.num_experts,
        kMaxDynamicBytes / sizeof(int32_t) - 1);
  const auto num_threads = static_cast<unsigned>(NumThreads(planning, request));
  WithPolicy(planning.policy, [&]<class Policy>(Policy) {
    const auto* kernel = reinterpret_cast<const void*>(&PlanLayerKernel<Policy>);
    void* arguments[] = {const_cast<PlanningView*>(&planning),
                         const_cast<LayerPlanRequest*>(&request)};
    LaunchOverlapped({.kernel = kernel,
                      .num_blocks = 1,
                      .num_threads = num_threads,
                      .shared_bytes = first_of_expert_bytes,
                      .overlaps_previous = CanOverlap(kernel)},
                     arguments, stream);
  });
}

}  // namespace expertflow
