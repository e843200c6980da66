#pragma once

#include <cstddef>

#include "core/predictor/feature_scales.h"
#include "cuda/expert_mlp/elements.h"
#include "cuda/predictor/block_sum.h"

namespace expertflow::predictor {

// The features of the token that is observed, x of core/predictor/predictor.h.
class Features {
 public:
  // All threads of the block call it.
  __device__ Features(const PredictParams& params, SumScratch& scratch) : params_(params) {
    const float power = BlockSum(ThreadPower(), scratch);
    const float length = sqrtf(power);
    length_ = isfinite(length) ? length : 0;
    bucket_ = -1;
    if (params.token != nullptr && params.view.num_buckets > 0 && *params.token >= 0) {
      bucket_ = static_cast<int>(*params.token % params.view.num_buckets);
    }
  }

  __device__ float length() const { return length_; }
  __device__ int bucket() const { return bucket_; }

  __device__ float Direction(int i) const { return length_ > 0 ? Hidden(i) / length_ : 0; }

  // Features behind the direction.
  __device__ float Rest(int target, int i) const {
    const View& view = params_.view;
    const int num_experts = view.rule.num_experts;
    if (i < view.hidden) {
      const size_t at = static_cast<size_t>(target) * static_cast<size_t>(view.hidden);
      return kPreviousScale * view.previous[at + static_cast<size_t>(i)];
    }
    const int e = i - view.hidden;
    if (e >= num_experts) return e == num_experts ? kBiasFeature : 0;
    if (bucket_ < 0) return 0;
    const size_t row = static_cast<size_t>(target) * static_cast<size_t>(view.num_buckets) +
                       static_cast<size_t>(bucket_);
    return kTokenScale *
           view.token_means[row * static_cast<size_t>(num_experts) + static_cast<size_t>(e)];
  }

  __device__ float operator()(int target, int i) const {
    return i < params_.view.hidden ? Direction(i) : Rest(target, i - params_.view.hidden);
  }

 private:
  // Of the 8 elements at 8 * thread and every 8 * kThreads behind: the same ones for every dtype.
  __device__ float ThreadPower() const {
    float power = 0;
    const int size = params_.view.hidden;
    for (int first = 8 * static_cast<int>(threadIdx.x); first < size; first += 8 * kThreads) {
      power += Power(first);
    }
    return power;
  }

  __device__ float Power(int first) const {
    switch (params_.hidden_dtype) {
      case DType::kFloat32:
        return PowerOf8(static_cast<const float*>(params_.hidden) + first);
      case DType::kBFloat16:
        return PowerOf8(static_cast<const __nv_bfloat16*>(params_.hidden) + first);
      case DType::kFloat16:
        return PowerOf8(static_cast<const __half*>(params_.hidden) + first);
    }
    return 0;
  }

  template <class Scalar>
  __device__ static float PowerOf8(const Scalar* hidden) {
    constexpr int kElements = mlp::kChunkElements<Scalar>;
    const auto* chunks = reinterpret_cast<const uint4*>(hidden);
    float power = 0;
#pragma unroll
    for (int chunk = 0; chunk < 8 / kElements; ++chunk) {
      float values[kElements];
      mlp::Unpack<Scalar>(chunks[chunk], values);
#pragma unroll
      for (int i = 0; i < kElements; ++i) power = fmaf(values[i], values[i], power);
    }
    return power;
  }

  __device__ float Hidden(int i) const {
    switch (params_.hidden_dtype) {
      case DType::kFloat32:
        return static_cast<const float*>(params_.hidden)[i];
      case DType::kBFloat16:
        return mlp::ToFloat(static_cast<const __nv_bfloat16*>(params_.hidden)[i]);
      case DType::kFloat16:
        return mlp::ToFloat(static_cast<const __half*>(params_.hidden)[i]);
    }
    return 0;
  }

  const PredictParams& params_;
  float length_;
  int bucket_;
};

}  // namespace expertflow::predictor
