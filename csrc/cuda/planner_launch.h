#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/block_planner.h"
#include "cuda/cuda_block.h"
#include "cuda/cuda_error.h"
#include "cuda/overlapped_launch.h"

// How the planner kernel is launched on a `Block`; the benchmarks bring one that takes the time.
// For CUDA sources only.

namespace expertflow {

// Reads a kernel's parameter long before it is needed, else every first use waits for the constant
// cache. Returns something of it, which the compiler must believe to be used.
template <class Parameter>
__device__ int32_t FetchParameter(const Parameter& parameter) {
  constexpr size_t kWordsPerLine = 64 / sizeof(int32_t);
  const auto* words = reinterpret_cast<const int32_t*>(&parameter);
  int32_t fetched = 0;
#pragma unroll
  for (size_t i = 0; i < sizeof parameter / sizeof *words; i += kWordsPerLine) fetched ^= words[i];
  return fetched;
}

template <class Policy, class Block, bool kOneTile>
__global__ void __launch_bounds__(CudaBlock::kMaxThreads, 1)
    PlanLayerKernel(const __grid_constant__ PlanningView planning,
                    const __grid_constant__ LayerPlanRequest request, Block block) {
  __shared__ BlockPlannerShared shared;
  extern __shared__ __align__(16) int32_t shared_words[];
  if (threadIdx.x == 0) shared.fetched = FetchParameter(planning) ^ FetchParameter(request);
  BlockPlanner<Policy, Block, kOneTile>(block, shared, shared_words, planning, request).Run();
}

inline void CheckPlannable(bool holds, const char* what, int64_t value, int64_t limit) {
  if (holds) return;
  throw std::invalid_argument(std::string("the planner kernel cannot plan ") + what + " " +
                              std::to_string(value) + ": the limit is " + std::to_string(limit));
}

// What a kernel that copies weights may have beside its variables, on any device of compute
// capability 8.0 and up: room for all copies that NumCopiedWords allows, and for their experts.
constexpr int kMaxSharedBytes = 72 * 1024;
static_assert(kMaxSharedBytes + sizeof(BlockPlannerShared) <= 99 * 1024);

// Shared memory for copies of weights, which comes on top of what other kernels have.
inline size_t CopiedBytes(const PlanningView& planning) {
  if (planning.policy != PolicyKind::kPredictedNeed) return 0;
  return sizeof(int32_t) * static_cast<size_t>(NumCopiedWords(planning.need.model));
}

// Whether a block has room for `bytes_of_experts`, which grow with the layer's experts.
inline void CheckShared(const PlanningView& planning, size_t fixed_bytes, size_t bytes_of_experts) {
  constexpr size_t kMaxBytes = 48 * 1024;
  const auto num_experts = static_cast<size_t>(planning.table.num_experts);
  const size_t limit = num_experts * (kMaxBytes - fixed_bytes) / bytes_of_experts;
  CheckPlannable(num_experts <= limit, "experts per layer", planning.table.num_experts,
                 static_cast<int64_t>(limit));
}

// A view as MakePlanningView returns it has no need model.
inline void CheckNeedModel(const PlanningView& planning) {
  if (planning.need.outcome != nullptr) return;
  throw std::invalid_argument("the planner kernel needs a need model: make one with DevicePlanner");
}

// Few slots for each thread, so that they are read at once, a thread for every id and every expert,
// other threads for experts than for slots if they are to be scored, and enough warps to find a
// token's victims in one pass.
inline int32_t NumPlannerThreads(const PlanningView& planning, const LayerPlanRequest& request) {
  constexpr int32_t kMinWarps = 8;
  static_assert(CudaBlock::kMaxThreads >= kMaxRoutedIds);
  const int32_t num_reads = NumSlotReads(RangeOf(planning, request.layer));
  const int32_t num_experts = planning.table.num_experts;
  const bool scores = planning.policy == PolicyKind::kPredictedNeed;
  const int32_t for_slots = scores ? num_reads + num_experts : num_reads;
  const int32_t wanted = std::max({for_slots, num_experts, request.ids.count});
  const int32_t num_warps = (wanted + CudaBlock::kWarpSize - 1) / CudaBlock::kWarpSize;
  return std::clamp(num_warps, kMinWarps, CudaBlock::kMaxWarps) * CudaBlock::kWarpSize;
}

// Throws as LaunchPlanLayer does.
template <class Block>
void LaunchPlanLayerOn(Block block, const PlanningView& planning, const LayerPlanRequest& request,
                       cudaStream_t stream) {
  if (planning.policy == PolicyKind::kPredictedNeed) CheckNeedModel(planning);
  const size_t shared_bytes = sizeof(int32_t) * static_cast<size_t>(NumPlannerWords(planning));
  CheckPlannable(request.layer >= 0 && request.layer < planning.table.num_layers, "layer",
                 request.layer, planning.table.num_layers - 1);
  CheckPlannable(request.ids.count >= 0 && request.ids.count <= kMaxRoutedIds, "routed ids",
                 request.ids.count, kMaxRoutedIds);
  CheckShared(planning, sizeof(BlockPlannerShared), shared_bytes - CopiedBytes(planning));
  const int32_t num_threads = NumPlannerThreads(planning, request);
  const bool is_one_tile = IsOneTile(planning, request.layer, num_threads);
  WithPolicy(planning.policy, [&]<class Policy>(Policy) {
    const auto* kernel =
        is_one_tile ? reinterpret_cast<const void*>(&PlanLayerKernel<Policy, Block, true>)
                    : reinterpret_cast<const void*>(&PlanLayerKernel<Policy, Block, false>);
    if (planning.policy == PolicyKind::kPredictedNeed) {
      // Not `shared_bytes`: the limit is the kernel's, and other threads launch it for other
      // planners.
      EXPERTFLOW_CUDA_CHECK(cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes));
    }
    void* arguments[] = {const_cast<PlanningView*>(&planning),
                         const_cast<LayerPlanRequest*>(&request), &block};
    LaunchOverlapped({.kernel = kernel,
                      .num_blocks = 1,
                      .num_threads = static_cast<unsigned>(num_threads),
                      .shared_bytes = shared_bytes},
                     arguments, stream);
  });
}

}  // namespace expertflow
