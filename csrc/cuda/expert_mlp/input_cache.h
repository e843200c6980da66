#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "cuda/expert_mlp/params.h"

namespace expertflow::mlp {

constexpr size_t kInputCacheBytes = kThreads * sizeof(unsigned);

// Brings the input row of a pass's first token into the L1 cache, without waiting for it. Else
// every step of a block's first unit would wait for the L2 cache, about a microsecond while HBM is
// busy: longer than the step's weights take. A plain load without use would be left out by the
// compiler, so a word of each sector is copied to shared memory, where nobody reads it.
class InputCache {
 public:
  // `words` has one for each thread of the block.
  __device__ explicit InputCache(void* words)
      : word_(static_cast<unsigned>(
            __cvta_generic_to_shared(static_cast<unsigned*>(words) + threadIdx.x))) {}
  __device__ ~InputCache() { asm volatile("cp.async.wait_all;" ::: "memory"); }

  // Once, by all threads of the block: a second copy into a thread's word would race with the
  // first. The copy joins the group that the thread commits next.
  template <class Scalar>
  __device__ void Fill(const Params& params, const Pass& pass) const {
    constexpr int kSectorElements = 32 / static_cast<int>(sizeof(Scalar));
    const int at = static_cast<int>(threadIdx.x) * kSectorElements;
    if (at >= params.num_inputs) return;
    const Scalar* row = static_cast<const Scalar*>(params.input) +
                        static_cast<size_t>(params.input_rows[pass.first_pair]) * params.num_inputs;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(word_), "l"(row + at) : "memory");
  }

 private:
  unsigned word_;  // in shared memory
};

}  // namespace expertflow::mlp
