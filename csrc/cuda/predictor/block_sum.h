#pragma once

#include "cuda/predictor/params.h"

namespace expertflow::predictor {

constexpr int kMaxSums = 6;
using SumScratch = float[kMaxSums][kWarps];

__device__ inline float WarpSum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(0xFFFFFFFFU, value, mask);
  return value;
}

// Replaces each value by its sum over the threads of the block, in an order that is always the
// same. All threads call it; it is a barrier, and takes another one before `scratch` is used again.
template <int kCount>
__device__ void BlockSum(float (&values)[kCount], SumScratch& scratch) {
  static_assert(kCount <= kMaxSums);
  const auto warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float sum = WarpSum(values[i]);
    if (threadIdx.x % 32 == 0) scratch[i][warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) values[i] += scratch[i][w];
  }
}

__device__ inline float BlockSum(float value, SumScratch& scratch) {
  float values[1] = {value};
  BlockSum(values, scratch);
  return values[0];
}

}  // namespace expertflow::predictor
