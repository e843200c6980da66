#pragma once

#include "cuda/predictor/block_router.h"
#include "cuda/predictor/features.h"

// What the last block of a distance makes of the sums, thread e for expert e.

namespace expertflow::predictor {

__host__ __device__ inline int NumGroups(const View& view) {
  return (view.rule.num_experts + kWarps - 1) / kWarps;
}

// Blocks that share the groups of experts.
__host__ __device__ inline int NumGroupBlocks(const View& view, const Split& split) {
  return (NumGroups(view) + split.groups_per_block - 1) / split.groups_per_block;
}

__host__ __device__ inline int NumParts(const Split& split, int distance) {
  return split.router_parts + (distance > 0 ? split.weight_parts : 0);
}

// The first of the experts' sums over a part.
__device__ inline size_t PartialRow(const PredictParams& params, int distance, int part) {
  return static_cast<size_t>(distance * params.view.max_parts + part) *
         static_cast<size_t>(params.view.rule.num_experts);
}

struct SummaryShared {
  RouterShared router;
  alignas(16) float candidates[kMaxExperts];
  float deviation;
};

class Summary {
 public:
  __device__ Summary(const PredictParams& params, SummaryShared& shared, const Features& features,
                     float length, int distance)
      : params_(params),
        view_(params.view),
        shared_(shared),
        features_(features),
        length_(length),
        distance_(distance),
        expert_(static_cast<int>(threadIdx.x)),
        is_expert_(expert_ < params.view.rule.num_experts),
        target_(params.layer + distance) {}

  // How the layer routes its own token, as Predictor::SetTargets.
  __device__ void SetTargets() const {
    const Margin margin = MarginAt(target_);
    if (expert_ == 0) {
      float& deviation = view_.deviations[target_];
      if (length_ > 0) {
        const float num_tokens = view_.num_tokens[target_] + 1.0f;
        view_.num_tokens[target_] = num_tokens;
        deviation += DeviationRate(num_tokens) * (margin.deviation - deviation);
      }
      shared_.deviation = deviation;
    }
    __syncthreads();
    if (!is_expert_) return;
    const float deviation = shared_.deviation;
    const float sharpness = deviation > 0 ? ScoreModel::kFirstGain / deviation : 0;
    const size_t at = ExpertOf(target_);
    view_.margins[at] = margin.value;
    view_.targets[at] = Logistic(sharpness * margin.value);
  }

  // What the update needs of this token; all threads call it. An embedding is no target: nothing
  // follows its direction.
  __device__ void KeepInputs() const {
    const size_t source = SourceOf(params_.layer);
    const auto layer = static_cast<size_t>(max(params_.layer, 0));
    const int hidden = view_.hidden;
    const int num_features = params_.layer < 0 ? hidden : view_.num_features;
    float* directions = view_.directions + source * static_cast<size_t>(hidden);
    float* rest = view_.rest + layer * static_cast<size_t>(view_.num_features - hidden);
    float power = 0;
#pragma unroll 2
    for (int i = 4 * expert_; i < num_features; i += 4 * kThreads) {
      const float4 x = features_.Raw4(target_, i);
      if (i < hidden) {
        *reinterpret_cast<float4*>(directions + i) = features_.ToDirection(x);
      } else {
        *reinterpret_cast<float4*>(rest + i - hidden) = x;
        power = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, power))));
      }
    }
    power = BlockSum(power, shared_.router.sums);
    if (expert_ == 0) view_.facts[source] = {length_, power, features_.Bucket()};
  }

  // Scores and needs of a later layer, and what of it to prefetch.
  __device__ void Foresee() const {
    const size_t row = SourceOf(params_.layer) * static_cast<size_t>(view_.max_distance) +
                       static_cast<size_t>(distance_ - 1);
    const auto pair = static_cast<size_t>(params_.first_pair + distance_ - 1);
    const ScoreScalars scalars = view_.scalars[pair];
    const NeedCalibration calibration = view_.calibrations[pair];
    const float seen_deviation = view_.deviations[target_];
    const float product = Sum(0, params_.split.weight_parts);
    const Margin margin = MarginAt(target_);
    const float deviation = seen_deviation > 0 ? seen_deviation : margin.deviation;
    const float base = deviation > 0 ? margin.value / deviation : 0;
    const float score = product + scalars.gain * base;
    const float need = calibration.Probability(score);
    const auto num_experts = static_cast<size_t>(view_.rule.num_experts);
    const auto place = static_cast<size_t>(distance_ - 1) * num_experts + threadIdx.x;
    if (is_expert_) {
      view_.base[row * num_experts + threadIdx.x] = base;
      view_.scores[row * num_experts + threadIdx.x] = score;
      view_.need[place] = need;
      if (params_.host_need != nullptr) params_.host_need[place] = need;
    }
    if (expert_ == 0) view_.schedules[row] = scalars.Schedule();
    if (params_.host_need != nullptr) Publish();
    List(need);
  }

 private:
  __device__ size_t ExpertOf(int layer) const {
    return static_cast<size_t>(layer * view_.rule.num_experts + expert_);
  }

  // Over parts of the expert's rows.
  __device__ float Sum(int first_part, int num_parts) const {
    if (!is_expert_) return 0;
    float sum = 0;
#pragma unroll 4
    for (int part = 0; part < num_parts; ++part) {
      sum +=
          __ldcg(view_.partial + PartialRow(params_, distance_, first_part + part) + threadIdx.x);
    }
    return sum;
  }

  __device__ Margin MarginAt(int layer) const {
    const int first_part = distance_ > 0 ? params_.split.weight_parts : 0;
    float logit = Sum(first_part, params_.split.router_parts) * length_;
    float correction = 0;
    if (is_expert_) {
      if (view_.biases != nullptr) logit += view_.biases[ExpertOf(layer)];
      if (view_.corrections != nullptr) correction = view_.corrections[ExpertOf(layer)];
    }
    return BlockRouter(view_.rule, shared_.router).ToMargin(logit, correction);
  }

  // The most needed experts that are neither resident nor on their way.
  __device__ void List(float need) const {
    bool is_listed = is_expert_ && need >= params_.min_need;
    if (is_listed && params_.expert_slot != nullptr) {
      is_listed = params_.expert_slot[ExpertOf(target_)] == SlotId::kNone;
    }
    shared_.candidates[expert_] = is_listed ? need : -INFINITY;
    const int num_listed = __syncthreads_count(is_listed);
    if (expert_ == 0) view_.prefetch_counts[distance_ - 1] = min(num_listed, params_.list_size);
    if (!is_listed) return;
    const int rank = RankOf(shared_.candidates, (view_.rule.num_experts + 3) / 4 * 4, expert_);
    if (rank < params_.list_size) {
      view_.prefetch_ids[(distance_ - 1) * params_.list_size + rank] = expert_;
    }
  }

  // Lets the host read the needs that this block wrote.
  __device__ void Publish() const {
    __threadfence_system();
    __syncthreads();
    if (expert_ == 0) params_.host_words[distance_ - 1] = params_.sequence;
  }

  const PredictParams& params_;
  const View& view_;
  SummaryShared& shared_;
  const Features& features_;
  float length_;  // of the router input
  int distance_;
  int expert_;
  bool is_expert_;
  int target_;
};

}  // namespace expertflow::predictor
