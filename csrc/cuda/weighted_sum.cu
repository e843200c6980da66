#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

#include "cuda/cuda_error.h"
#include "cuda/expert_mlp/elements.h"
#include "cuda/weighted_sum.h"

namespace expertflow {
namespace {

constexpr unsigned kThreads = 256;

// One thread for each element of a token; the tokens are blockIdx.y. `Weight` is the wider dtype,
// or the same.
template <class Scalar, class Weight>
__global__ void WeightedSumKernel(const Scalar* __restrict__ partial,
                                  const Weight* __restrict__ weights, Scalar* __restrict__ output,
                                  int top_k, int hidden) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= hidden) return;
  const size_t token = blockIdx.y;
  partial += token * static_cast<size_t>(top_k) * static_cast<size_t>(hidden) + i;
  weights += token * static_cast<size_t>(top_k);
  float sum = 0;
  for (int j = 0; j < top_k; ++j) {
    const float product =
        __fmul_rn(mlp::ToFloat(partial[static_cast<size_t>(j) * hidden]), mlp::ToFloat(weights[j]));
    sum = __fadd_rn(sum, mlp::ToFloat(mlp::FromFloat<Weight>(product)));
  }
  output[token * static_cast<size_t>(hidden) + i] =
      mlp::FromFloat<Scalar>(mlp::ToFloat(mlp::FromFloat<Weight>(sum)));
}

template <class Scalar, class Weight>
void Launch(const WeightedSum& sum, cudaStream_t stream) {
  const dim3 grid((static_cast<unsigned>(sum.hidden) + kThreads - 1) / kThreads,
                  static_cast<unsigned>(sum.num_tokens));
  WeightedSumKernel<<<grid, kThreads, 0, stream>>>(
      static_cast<const Scalar*>(sum.partial), static_cast<const Weight*>(sum.weights),
      static_cast<Scalar*>(sum.output), sum.top_k, sum.hidden);
  EXPERTFLOW_CUDA_CHECK(
      cudaGetLastError(),
      std::to_string(sum.num_tokens) + " tokens, hidden size " + std::to_string(sum.hidden));
}

template <class Scalar>
void LaunchFor(const WeightedSum& sum, cudaStream_t stream) {
  if (sum.weights_dtype == DType::kFloat32) {
    Launch<Scalar, float>(sum, stream);
  } else {
    Launch<Scalar, Scalar>(sum, stream);
  }
}

}  // namespace

void LaunchWeightedSum(const WeightedSum& sum, cudaStream_t stream) {
  if (sum.num_tokens < 1 || sum.num_tokens > 65535 || sum.top_k < 1 || sum.hidden < 1) {
    throw std::invalid_argument("weighted sum of " + std::to_string(sum.num_tokens) +
                                " tokens, top-" + std::to_string(sum.top_k) + ", hidden size " +
                                std::to_string(sum.hidden) + ": 1 to 65535 tokens are supported");
  }
  if (sum.weights_dtype != sum.dtype && sum.weights_dtype != DType::kFloat32) {
    throw std::invalid_argument("weights of dtype " + DTypeName(sum.weights_dtype) +
                                " for experts of dtype " + DTypeName(sum.dtype) +
                                ": use that or float32");
  }
  switch (sum.dtype) {
    case DType::kFloat32:
      return LaunchFor<float>(sum, stream);
    case DType::kBFloat16:
      return LaunchFor<__nv_bfloat16>(sum, stream);
    case DType::kFloat16:
      return LaunchFor<__half>(sum, stream);
  }
}

}  // namespace expertflow
