#pragma once

#include "core/predictor/feature_scales.h"
#include "cuda/predictor/block_sum.h"
#include "cuda/predictor/row_part.h"

// The update of one target layer. No block reads what another one writes: what all need of this
// pass was kept by its predictions. Block i < num_pairs takes the scalars of pair i, the next one
// what is remembered of the token, and the others a part of the rows of kWarps experts each.

namespace expertflow::predictor {

struct LearnShared {
  alignas(16) float x[kLearnLoads * 32 * 4];
  SumScratch sums;
};

class LearnBlock {
 public:
  __device__ LearnBlock(const LearnParams& params, LearnShared& shared)
      : params_(params),
        view_(params.view),
        shared_(shared),
        num_experts_(static_cast<size_t>(params.view.rule.num_experts)),
        layer_(static_cast<size_t>(params.layer)),
        source_(SourceOf(params.layer)) {}

  // Experts' weights += coefficient * x.
  __device__ void UpdateWeights(int block) const {
    const int num_parts = params_.split.num_parts;
    const int per_pair = num_parts * NumGroups(view_);
    const int index = block / per_pair;
    const int expert = block % per_pair / num_parts * kWarps + static_cast<int>(threadIdx.x / 32);
    const ChunkRange range(block % num_parts, params_.split, 0, view_.num_features / 4);
    const bool is_expert = expert < view_.rule.num_experts;
    const size_t row = static_cast<size_t>(params_.pairs[index]) * num_experts_ + size_t(expert);
    auto* weights =
        reinterpret_cast<uint4*>(view_.weights + row * static_cast<size_t>(view_.num_features));
    RowPart part;
    part.Load(weights, range, is_expert);
    const size_t from = source_ - static_cast<size_t>(params_.distances[index]);
    const float coefficient = is_expert ? Coefficient(index, expert) : 0;
    FillFeatures(from, range);
    __syncthreads();
    if (is_expert && Teaches(from)) Store(part, weights, range, coefficient);
  }

  // Calibration and gain of a pair; thread e adds expert e.
  __device__ void UpdateScalars(int index) const {
    const size_t from = source_ - static_cast<size_t>(params_.distances[index]);
    if (!Teaches(from)) return;
    const auto pair = static_cast<size_t>(params_.pairs[index]);
    NeedCalibration calibration = view_.calibrations[pair];
    float sums[6] = {};
    if (threadIdx.x < num_experts_) {
      const size_t at = layer_ * num_experts_ + threadIdx.x;
      const size_t foreseen = Row(index) * num_experts_ + threadIdx.x;
      const float score = view_.scores[foreseen];
      CalibrationStep step;
      step.Add(calibration, score, view_.margins[at] > 0);
      sums[0] = step.gradient_slope;
      sums[1] = step.gradient_offset;
      sums[2] = step.curvature_slope;
      sums[3] = step.curvature_both;
      sums[4] = step.curvature_offset;
      sums[5] = (Logistic(score) - view_.targets[at]) * view_.base[foreseen];
    }
    BlockSum(sums, shared_.sums);
    if (threadIdx.x != 0) return;
    CalibrationStep{sums[0], sums[1], sums[2], sums[3], sums[4]}.Apply(calibration);
    view_.calibrations[pair] = calibration;
    ScoreScalars scalars = view_.scalars[pair];
    scalars.LearnGain(sums[5]);
    view_.scalars[pair] = scalars;
  }

  // The mean target of the token's id, and the direction as that of the token before.
  __device__ void Remember() const {
    const LayerFacts facts = view_.facts[source_];
    const auto hidden = static_cast<size_t>(view_.hidden);
#pragma unroll 4
    for (size_t i = threadIdx.x; i < hidden; i += kThreads) {
      view_.previous[layer_ * hidden + i] = view_.directions[source_ * hidden + i];
    }
    if (facts.bucket < 0 || facts.length <= 0) return;
    const size_t row =
        layer_ * static_cast<size_t>(view_.num_buckets) + static_cast<size_t>(facts.bucket);
    const float count = view_.token_counts[row] + 1.0f;
    __syncthreads();
    if (threadIdx.x == 0) view_.token_counts[row] = count;
    if (threadIdx.x >= num_experts_) return;
    const float usual =
        static_cast<float>(view_.rule.top_k) / static_cast<float>(view_.rule.num_experts);
    float& mean = view_.token_means[row * num_experts_ + threadIdx.x];
    mean += TokenRate(count) * (view_.targets[layer_ * num_experts_ + threadIdx.x] - usual - mean);
  }

 private:
  __device__ bool Teaches(size_t from) const {
    return view_.facts[source_].length > 0 && view_.facts[from].length > 0;
  }

  // Of what the pair foresaw, [1 + L, max_distance].
  __device__ size_t Row(int index) const {
    const auto distance = static_cast<size_t>(params_.distances[index]);
    return (source_ - distance) * static_cast<size_t>(view_.max_distance) + distance - 1;
  }

  __device__ float Coefficient(int index, int expert) const {
    const size_t row = Row(index);
    const float power = 1.0f + view_.facts[source_].rest_power;  // |h/|h|| is 1
    const float step = ScoreScalars::WeightStep(view_.schedules[row], power);
    const float score = view_.scores[row * num_experts_ + static_cast<size_t>(expert)];
    const float target = view_.targets[layer_ * num_experts_ + static_cast<size_t>(expert)];
    return -step * (Logistic(score) - target);
  }

  __device__ void FillFeatures(size_t from, const ChunkRange& range) const {
    const int hidden = view_.hidden;
    const float* direction = view_.directions + from * static_cast<size_t>(hidden);
    const float* rest =
        view_.rest + layer_ * static_cast<size_t>(view_.num_features - hidden) - hidden;
    auto* x = reinterpret_cast<float4*>(shared_.x);
    for (int i = range.begin + static_cast<int>(threadIdx.x); i < range.end; i += kThreads) {
      const float* source = 4 * i < hidden ? direction : rest;
      x[i - range.begin] = *reinterpret_cast<const float4*>(source + 4 * i);
    }
  }

  __device__ void Store(const RowPart& part, uint4* weights, const ChunkRange& range,
                        float coefficient) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kLearnLoads; ++i) {
      const int at = range.begin + 32 * i + lane;
      if (at >= range.end) continue;
      const float4 x = reinterpret_cast<const float4*>(shared_.x)[32 * i + lane];
      const uint4& old = part.chunks[i];
      weights[at] = {__float_as_uint(fmaf(coefficient, x.x, __uint_as_float(old.x))),
                     __float_as_uint(fmaf(coefficient, x.y, __uint_as_float(old.y))),
                     __float_as_uint(fmaf(coefficient, x.z, __uint_as_float(old.z))),
                     __float_as_uint(fmaf(coefficient, x.w, __uint_as_float(old.w)))};
    }
  }

  const LearnParams& params_;
  const View& view_;
  LearnShared& shared_;
  size_t num_experts_;
  size_t layer_;  // whose token taught, and as what it is a source
  size_t source_;
};

}  // namespace expertflow::predictor
