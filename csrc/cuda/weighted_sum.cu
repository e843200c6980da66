#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

#include "cuda/expert_mlp/elements.h"
#include "cuda/grid_dependency.h"
#include "cuda/overlapped_launch.h"
#include "cuda/weighted_sum.h"

namespace expertflow {
namespace {

constexpr unsigned kThreads = 256;

// One thread for each element of a token; the tokens are blockIdx.y.
template <class Scalar, class Weight>
__global__ void __launch_bounds__(kThreads)
    WeightedSumKernel(const __grid_constant__ WeightedSum sum) {
  WaitForPrerequisites();
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= sum.hidden) return;
  const size_t token = blockIdx.y;
  const size_t first_pair = token * static_cast<size_t>(sum.top_k);
  const auto* partial =
      static_cast<const Scalar*>(sum.partial) + first_pair * static_cast<size_t>(sum.hidden) + i;
  const auto* weights = static_cast<const Weight*>(sum.weights) + first_pair;
  float total = 0;
#pragma unroll 4
  for (int j = 0; j < sum.top_k; ++j) {
    const float product = __fmul_rn(mlp::ToFloat(*partial), mlp::ToFloat(weights[j]));
    total = __fadd_rn(total, mlp::ToFloat(mlp::FromFloat<Weight>(product)));
    partial += sum.hidden;
  }
  static_cast<Scalar*>(sum.output)[token * static_cast<size_t>(sum.hidden) + i] =
      mlp::FromFloat<Scalar>(mlp::ToFloat(mlp::FromFloat<Weight>(total)));
}

template <class Scalar, class Weight>
void Launch(WeightedSum sum, cudaStream_t stream) {
  const auto* kernel = reinterpret_cast<const void*>(&WeightedSumKernel<Scalar, Weight>);
  void* arguments[] = {&sum};
  LaunchOverlapped({.kernel = kernel,
                    .num_blocks = {(static_cast<unsigned>(sum.hidden) + kThreads - 1) / kThreads,
                                   static_cast<unsigned>(sum.num_tokens)},
                    .num_threads = kThreads,
                    .shared_bytes = 0},
                   arguments, stream);
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
