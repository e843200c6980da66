#pragma once

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/block_selection.h"
#include "core/plan_phase.h"
#include "cuda/grid_dependency.h"

namespace expertflow {

// The `Block` of core/block_selection.h and core/block_planner.h.
struct CudaBlock {
  static constexpr int32_t kWarpSize = 32;
  static constexpr int32_t kMaxThreads = 640;  // with 96 registers each
  static constexpr int32_t kMaxWarps = kMaxThreads / kWarpSize;
  static constexpr unsigned kAllLanes = 0xffffffffU;

  __device__ int32_t thread() const { return static_cast<int32_t>(threadIdx.x); }
  __device__ int32_t num_threads() const { return static_cast<int32_t>(blockDim.x); }
  // The next kernel may start from here on; it waits in turn, and so at most one is ahead.
  __device__ void WaitForPrevious() {
    WaitForPrerequisites();
    LetDependentsStart();
  }
  __device__ void Mark(PlanPhase) {}
  __device__ void Sync() { __syncthreads(); }
  __device__ void SyncWarp() { __syncwarp(); }
  __device__ void Expect(uint64_t& barrier, int32_t num_arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(InShared(barrier)), "r"(num_arrivals)
                 : "memory");
  }
  __device__ void Arrive(uint64_t& barrier) {
    [[maybe_unused]] uint64_t state;
    asm volatile("mbarrier.arrive.shared.b64 %0, [%1];"
                 : "=l"(state)
                 : "r"(InShared(barrier))
                 : "memory");
  }
  __device__ void Await(uint64_t& barrier) {
    uint32_t is_complete;
    do {  // its first phase, number 0
      asm volatile(
          "{\n\t.reg .pred complete;\n\t"
          "mbarrier.test_wait.parity.shared.b64 complete, [%1], 0;\n\t"
          "selp.b32 %0, 1, 0, complete;\n\t}"
          : "=r"(is_complete)
          : "r"(InShared(barrier))
          : "memory");
    } while (is_complete == 0);
  }
  __device__ uint32_t Ballot(bool flag) { return __ballot_sync(kAllLanes, flag); }
  __device__ uint32_t OfLane(uint32_t value, int32_t lane) {
    return __shfl_sync(kAllLanes, value, lane);
  }
  __device__ int32_t Add(int32_t& counter, int32_t amount) { return atomicAdd(&counter, amount); }
  __device__ uint32_t Add(uint32_t& counter, uint32_t amount) {
    return atomicAdd(&counter, amount);
  }
  __device__ int64_t Add(int64_t& counter, int64_t amount) {
    return static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(&counter),
                                          static_cast<unsigned long long>(amount)));
  }
  __device__ void Min(int32_t& value, int32_t other) { atomicMin(&value, other); }
  __device__ void Min(uint32_t& value, uint32_t other) { atomicMin(&value, other); }
  template <class Words>
  __device__ void CopyAsync(Words& to, const Words& from) {
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

 private:
  __device__ static uint32_t InShared(uint64_t& word) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&word));
  }
};

}  // namespace expertflow
