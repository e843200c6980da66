#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/block_planner.h"
#include "cuda/grid_dependency.h"
#include "cuda/overlapped_launch.h"
#include "cuda/planner_kernel.h"

namespace expertflow {
namespace {

struct CudaBlock {
  __device__ int32_t thread() const { return static_cast<int32_t>(threadIdx.x); }
  __device__ int32_t num_threads() const { return static_cast<int32_t>(blockDim.x); }
  // The next kernel may start from here on; it waits in turn, and so at most one is ahead.
  __device__ void WaitForPrevious() {
    WaitForPrerequisites();
    LetDependentsStart();
  }
  __device__ void Sync() { __syncthreads(); }
  __device__ int64_t ShuffleXor(int64_t value, int32_t mask) {
    return __shfl_xor_sync(0xffffffffU, static_cast<long long>(value), mask);
  }
  __device__ int32_t Add(int32_t& counter, int32_t amount) { return atomicAdd(&counter, amount); }
  __device__ int64_t Add(int64_t& counter, int64_t amount) {
    return static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(&counter),
                                          static_cast<unsigned long long>(amount)));
  }
  __device__ void Min(int32_t& value, int32_t other) { atomicMin(&value, other); }
  __device__ void CopyAsync(int32_t& to, const int32_t& from) {
    __pipeline_memcpy_async(&to, &from, sizeof to);
  }
  __device__ void WaitForCopies() {
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }
  __device__ void Release(uint64_t& word, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(&word)),
                 "l"(value)
                 : "memory");
  }
};

template <class Policy>
__global__ void __launch_bounds__(kMaxBlockThreads)
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

// Few slots for each thread, so that they are read at once, and a thread for every id.
int32_t NumThreads(const PlanningView& planning, const LayerPlanRequest& request) {
  const SlotRange range = RangeOf(planning, request.layer);
  constexpr int32_t kPerTile = OwnSlots<Lru>::kPerTile;
  const int32_t wanted =
      std::max((range.end - range.begin + kPerTile - 1) / kPerTile, request.ids.count);
  const int32_t num_warps = std::max((wanted + kWarpSize - 1) / kWarpSize, 1);
  return std::min(num_warps * kWarpSize, kMaxBlockThreads);
}

}  // namespace

void LaunchPlanLayer(const PlanningView& planning, const LayerPlanRequest& request,
                     cudaStream_t stream) {
  constexpr size_t kMaxDynamicBytes = 48 * 1024 - sizeof(BlockPlannerShared);
  const size_t first_of_expert_bytes =
      sizeof(int32_t) * static_cast<size_t>(planning.table.num_experts);
  Check(request.layer >= 0 && request.layer < planning.table.num_layers, "layer", request.layer,
        planning.table.num_layers - 1);
  Check(request.ids.count >= 0 && request.ids.count <= kMaxRoutedIds, "routed ids",
        request.ids.count, kMaxRoutedIds);
  Check(first_of_expert_bytes <= kMaxDynamicBytes, "experts per layer", planning.table.num_experts,
        kMaxDynamicBytes / sizeof(int32_t));
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
