#pragma once

#include <cstddef>

#include "core/predictor/feature_scales.h"
#include "cuda/expert_mlp/elements.h"
#include "cuda/predictor/block_sum.h"

namespace expertflow::predictor {

// Four neighbours of a router input as they lie in memory.
template <class Scalar>
struct Packed4 {
  uint2 words;

  __device__ float4 Unpack() const {
    float4 four;
    mlp::UnpackWord(words.x, Scalar(), &four.x);
    mlp::UnpackWord(words.y, Scalar(), &four.z);
    return four;
  }
};
template <>
struct Packed4<float> {
  float4 four;

  __device__ float4 Unpack() const { return four; }
};

// A squared length.
__device__ inline float Power(const float4& x) {
  return fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, x.w * x.w)));
}

// The length of a router input, given its square; 0 if that is not finite.
__device__ inline float LengthOf(float power) {
  const float length = sqrtf(power);
  return isfinite(length) ? length : 0;
}

// The features x of the token that is observed, see core/predictor/predictor.h, by fours: fours[i]
// are those from at[i] on, 0 where that is negative. All loads of a call are under way at once.
class Features {
 public:
  __device__ explicit Features(const PredictParams& params) : params_(params), view_(params.view) {}

  // Where to find the mean of the token's id; -1 if it is not known.
  __device__ int Bucket() const {
    if (params_.token == nullptr || view_.num_buckets == 0 || *params_.token < 0) return -1;
    return static_cast<int>(*params_.token % view_.num_buckets);
  }

  // Of h as the layer gives it, not yet divided by its length; at[i] < H.
  template <int kCount>
  __device__ void LoadHidden(const int (&at)[kCount], float4 (&fours)[kCount]) const {
    switch (params_.hidden_dtype) {
      case DType::kBFloat16:
        return LoadHiddenAs<__nv_bfloat16>(at, fours);
      case DType::kFloat16:
        return LoadHiddenAs<__half>(at, fours);
      default:
        return LoadHiddenAs<float>(at, fours);
    }
  }

  // Of what follows h in the features of a pair with that target; at[i] >= H.
  template <int kCount>
  __device__ void LoadRest(int target, const int (&at)[kCount], float4 (&fours)[kCount]) const {
    const int first_mean = 2 * view_.hidden;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      fours[i] = {0, 0, 0, 0};
      if (at[i] >= 0 && at[i] < first_mean) {
        fours[i] = *reinterpret_cast<const float4*>(Previous(target, at[i]));
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float4& h = fours[i];
      fours[i] = {kPreviousScale * h.x, kPreviousScale * h.y, kPreviousScale * h.z,
                  kPreviousScale * h.w};
    }
    bool has_means = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) has_means |= at[i] >= first_mean;
    if (has_means) LoadMeans(target, at, fours);
  }

  // Has the cache fetch what of them no kernel in flight writes: the update of that layer does, but
  // after this prediction.
  template <int kCount>
  __device__ void PrefetchRest(int target, const int (&at)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (at[i] < view_.hidden || at[i] >= 2 * view_.hidden) continue;
      asm volatile(
          "prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(Previous(target, at[i]))));
    }
  }

 private:
  template <class Scalar, int kCount>
  __device__ void LoadHiddenAs(const int (&at)[kCount], float4 (&fours)[kCount]) const {
    const auto* hidden = static_cast<const Scalar*>(params_.hidden);
    Packed4<Scalar> packed[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      packed[i] = {};
      if (at[i] >= 0) packed[i] = *reinterpret_cast<const Packed4<Scalar>*>(hidden + at[i]);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) fours[i] = packed[i].Unpack();
  }

  __device__ const float* Previous(int target, int at) const {
    const auto hidden = static_cast<size_t>(view_.hidden);
    return view_.previous + static_cast<size_t>(target) * hidden + (at - view_.hidden);
  }

  // Those of the fours that lie behind h': the mean target of the token's id, the bias, zeros.
  template <int kCount>
  __device__ void LoadMeans(int target, const int (&at)[kCount], float4 (&fours)[kCount]) const {
    const int num_experts = view_.rule.num_experts, first_mean = 2 * view_.hidden;
    const int bucket = Bucket();
    const int64_t row = int64_t{target} * view_.num_buckets + max(bucket, 0);
    const float* means = view_.token_means + row * num_experts;
    float mean[kCount][4];
#pragma unroll
    for (int i = 0; i < 4 * kCount; ++i) {
      const int e = at[i / 4] - first_mean + i % 4;
      mean[i / 4][i % 4] = e >= 0 && e < num_experts && bucket >= 0 ? means[e] : 0;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (at[i] < first_mean) continue;
      const auto value = [&](int j) {
        return at[i] - first_mean + j == num_experts ? kBiasFeature : kTokenScale * mean[i][j];
      };
      fours[i] = {value(0), value(1), value(2), value(3)};
    }
  }

  const PredictParams& params_;
  const View& view_;
};

}  // namespace expertflow::predictor
