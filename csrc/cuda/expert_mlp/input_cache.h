#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "cuda/expert_mlp/params.h"

namespace expertflow::mlp {

constexpr size_t kInputCacheBytes = kThreads * sizeof(unsigned);

// Brings a pass's input rows into the L1 cache, all at once and without waiting for them. Else
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

  // By all threads of the block. The copies join the group that the thread commits next.
  template <class Scalar>
  __device__ void Fill(const Params& params, const Pass& pass) const {
    constexpr int kSectorElements = 32 / static_cast<int>(sizeof(Scalar));
    for (int pair = pass.first_pair; pair < pass.first_pair + pass.num_pairs; ++pair) {
      const Scalar* row = static_cast<const Scalar*>(params.input) +
                          static_cast<size_t>(params.input_rows[pair]) * params.num_inputs;
      for (int at = static_cast<int>(threadIdx.x) * kSectorElements; at < params.num_inputs;
           at += kThreads * kSectorElements) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(word_), "l"(row + at)
                     : "memory");
      }
    }
  }

 private:
  unsigned word_;  // in shared memory
};

}  // namespace expertflow::mlp
