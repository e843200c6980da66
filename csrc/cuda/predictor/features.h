#pragma once

#include <cstddef>

#include "core/predictor/feature_scales.h"
#include "cuda/expert_mlp/elements.h"
#include "cuda/predictor/block_sum.h"

namespace expertflow::predictor {

// Four neighbours of a router input.
template <class Scalar>
__device__ float4 Load4(const void* values, int first) {
  const uint2 words = *reinterpret_cast<const uint2*>(static_cast<const Scalar*>(values) + first);
  float4 four;
  mlp::UnpackWord(words.x, Scalar(), &four.x);
  mlp::UnpackWord(words.y, Scalar(), &four.z);
  return four;
}
template <>
__device__ inline float4 Load4<float>(const void* values, int first) {
  return *reinterpret_cast<const float4*>(static_cast<const float*>(values) + first);
}

// The features x of the token that is observed, see core/predictor/predictor.h, four at a time.
class Features {
 public:
  __device__ explicit Features(const PredictParams& params) : params_(params), view_(params.view) {}

  // Where to find the mean of the token's id; -1 if it is not known.
  __device__ int Bucket() const {
    if (params_.token == nullptr || view_.num_buckets == 0 || *params_.token < 0) return -1;
    return static_cast<int>(*params_.token % view_.num_buckets);
  }

  // All threads of the block call it, before they ask for directions. 0 if the router input is not
  // finite, or 0.
  __device__ float MeasureLength(SumScratch& scratch) {
    float power = 0;
    for (int i = 4 * static_cast<int>(threadIdx.x); i < view_.hidden; i += 4 * kThreads) {
      const float4 h = Hidden4(i);
      power = fmaf(h.x, h.x, fmaf(h.y, h.y, fmaf(h.z, h.z, fmaf(h.w, h.w, power))));
    }
    const float length = sqrtf(BlockSum(power, scratch));
    length_ = isfinite(length) ? length : 0;
    return length_;
  }

  // Features i to i + 3 of a pair with that target; the first H as they are, to be passed to
  // ToDirection once the length is known.
  __device__ float4 Raw4(int target, int i) const {
    if (i < view_.hidden) return Hidden4(i);
    i -= view_.hidden;
    if (i >= view_.hidden) return Token4(target, i - view_.hidden);
    const size_t at = static_cast<size_t>(target) * static_cast<size_t>(view_.hidden);
    const float4 h = *reinterpret_cast<const float4*>(view_.previous + at + i);
    return {kPreviousScale * h.x, kPreviousScale * h.y, kPreviousScale * h.z, kPreviousScale * h.w};
  }

  __device__ float4 ToDirection(const float4& h) const {
    if (length_ == 0) return {0, 0, 0, 0};
    return {h.x / length_, h.y / length_, h.z / length_, h.w / length_};
  }

 private:
  __device__ float4 Hidden4(int i) const {
    switch (params_.hidden_dtype) {
      case DType::kBFloat16:
        return Load4<__nv_bfloat16>(params_.hidden, i);
      case DType::kFloat16:
        return Load4<__half>(params_.hidden, i);
      default:
        return Load4<float>(params_.hidden, i);
    }
  }

  // From the mean target of the token's id on: E of them, the bias, zeros.
  __device__ float4 Token4(int target, int first) const {
    const int bucket = Bucket();
    const auto row = static_cast<size_t>(target) * static_cast<size_t>(view_.num_buckets) +
                     static_cast<size_t>(max(bucket, 0));
    const int num_experts = view_.rule.num_experts;
    const float* means = view_.token_means + row * static_cast<size_t>(num_experts);
    float four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int e = first + i;
      four[i] = e == num_experts ? kBiasFeature : 0;
      if (e < num_experts && bucket >= 0) four[i] = kTokenScale * means[e];
    }
    return {four[0], four[1], four[2], four[3]};
  }

  const PredictParams& params_;
  const View& view_;
  float length_ = 0;
};

}  // namespace expertflow::predictor
