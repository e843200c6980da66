#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/dtype.h"
#include "cuda/expert_cache.h"

namespace expertflow::cuda {

// The tensors of one decode step, in device memory; H is the hidden size.
struct DecodeStep {
  const void* hidden;   // [num_tokens, H]
  const void* weights;  // [num_tokens, top_k], of `weights_dtype`
  DType weights_dtype;
  void* output;     // [num_tokens, H]
  void* partial;    // [num_tokens * top_k, H]
  void* workspace;  // DecodeWorkspaceBytes
  int32_t num_tokens;
  int32_t top_k;
};

// Throws std::invalid_argument if the cache was made without an MLP that the kernels know.
size_t DecodeWorkspaceBytes(const ExpertCache& cache, int32_t num_tokens, int32_t top_k);

// Computes the layer that was begun last: first the experts that are resident, in one launch, then
// each other one as it arrives; then the weighted sum. Enqueues on `stream`; blocks as
// ExpertCache::Wait does. Throws std::invalid_argument if the step is not that of the current plan,
// and what Wait throws.
void ComputeDecodeStep(ExpertCache& cache, const DecodeStep& step, cudaStream_t stream);

// The same with the experts that are in `slots` [num_tokens * top_k], whichever they are: asks
// nothing of the cache and waits for nothing, so it can be captured in a CUDA graph. Throws
// std::invalid_argument for slots that do not exist or another number of them.
void ComputeSlots(const ExpertCache& cache, std::span<const int64_t> slots, const DecodeStep& step,
                  cudaStream_t stream);

}  // namespace expertflow::cuda
