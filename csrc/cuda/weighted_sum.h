#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"

namespace expertflow {

struct WeightedSum {
  const void* partial;  // [num_tokens, top_k, hidden], of `dtype`
  const void* weights;  // [num_tokens, top_k], of `weights_dtype`
  void* output;         // [num_tokens, hidden], of `dtype`
  int32_t num_tokens;
  int32_t top_k;
  int32_t hidden;
  DType dtype;
  DType weights_dtype;  // `dtype` or float32
};

// Enqueues on `stream` output[t] = sum over j of partial[t, j] * weights[t, j], rounded as torch
// rounds (partial * weights.unsqueeze(-1)).sum(1).to(dtype): products to the wider of the two
// dtypes, the sum, in float32 and in the order of j, to the same, then to `dtype`. Can be captured
// in a graph. Throws std::invalid_argument for sizes below 1 or another dtype of the weights,
// CudaError if it cannot be launched.
void LaunchWeightedSum(const WeightedSum& sum, cudaStream_t stream);

}  // namespace expertflow
