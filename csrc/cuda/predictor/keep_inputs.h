#pragma once

#include "cuda/predictor/block_sum.h"
#include "cuda/predictor/features.h"

namespace expertflow::predictor {

struct KeepShared {
  SumScratch length_sums, rest_sums;
};

// What the update needs of this token, kept by a block of its own while others foresee.
class KeepBlock {
 public:
  __device__ KeepBlock(const PredictParams& params, KeepShared& shared)
      : params_(params), view_(params.view), features_(params), shared_(shared) {}

  // An embedding is no target: nothing follows its direction.
  __device__ void Keep() const {
    const size_t source = SourceOf(params_.layer);
    const float length = Length();
    KeepDirection(length, view_.directions + source * static_cast<size_t>(view_.hidden));
    const float rest_power = params_.layer < 0 ? 0 : KeepRest();
    if (threadIdx.x == 0) view_.facts[source] = {length, rest_power, features_.Bucket()};
  }

 private:
  // What a thread takes at once, four features each.
  static constexpr int kFours = 4;

  // Calls visit(at) for the thread's share of the features from `begin` to `end`, in turns.
  template <class Visit>
  __device__ static void ForEachTurn(int begin, int end, const Visit& visit) {
    for (int first = begin + 4 * static_cast<int>(threadIdx.x); first < end;
         first += 4 * kFours * kThreads) {
      int at[kFours];
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        at[i] = first + 4 * i * kThreads;
        if (at[i] >= end) at[i] = -1;
      }
      visit(at);
    }
  }

  // Of the router input; 0 if that is not finite.
  __device__ float Length() const {
    float power = 0;
    ForEachTurn(0, view_.hidden, [&](const int (&at)[kFours]) {
      float4 h[kFours];
      features_.LoadHidden(at, h);
      for (const float4& four : h) power += Power(four);
    });
    return LengthOf(BlockSum(power, shared_.length_sums));
  }

  __device__ void KeepDirection(float length, float* direction) const {
    ForEachTurn(0, view_.hidden, [&](const int (&at)[kFours]) {
      float4 h[kFours];
      features_.LoadHidden(at, h);
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        if (at[i] < 0) continue;
        float4 unit = {0, 0, 0, 0};
        if (length > 0) {
          unit = {h[i].x / length, h[i].y / length, h[i].z / length, h[i].w / length};
        }
        *reinterpret_cast<float4*>(direction + at[i]) = unit;
      }
    });
  }

  // Returns its squared length.
  __device__ float KeepRest() const {
    const int hidden = view_.hidden;
    const auto layer = static_cast<size_t>(params_.layer);
    float* rest = view_.rest + layer * static_cast<size_t>(view_.num_features - hidden) - hidden;
    float power = 0;
    ForEachTurn(hidden, view_.num_features, [&](const int (&at)[kFours]) {
      float4 x[kFours];
      features_.LoadRest(params_.layer, at, x);
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        if (at[i] >= 0) *reinterpret_cast<float4*>(rest + at[i]) = x[i];
        power += Power(x[i]);
      }
    });
    return BlockSum(power, shared_.rest_sums);
  }

  const PredictParams& params_;
  const View& view_;
  Features features_;
  KeepShared& shared_;
};

}  // namespace expertflow::predictor
