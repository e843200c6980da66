#pragma once

#include "cuda/predictor/block_router.h"
#include "cuda/predictor/features.h"

// What the last block of a distance makes of the sums, thread e for expert e.

namespace expertflow::predictor {

// The first of the experts' sums over a part.
__device__ inline float* PartialOf(const PredictParams& params, int distance, int part) {
  return params.view.partial + static_cast<size_t>(distance * params.view.max_parts + part) *
                                   static_cast<size_t>(params.view.rule.num_experts);
}

// The squared lengths of the parts of h.
__device__ inline float* PowersOf(const PredictParams& params, int distance) {
  return params.view.powers + static_cast<size_t>(distance * params.view.max_parts);
}

struct SummaryShared {
  RouterShared router;
  alignas(16) float candidates[kMaxExperts + 3];
  int num_listed[kWarps];
};

class Summary {
 public:
  __device__ Summary(const PredictParams& params, SummaryShared& shared, int distance)
      : params_(params),
        view_(params.view),
        shared_(shared),
        distance_(distance),
        expert_(static_cast<int>(threadIdx.x)),
        is_expert_(expert_ < params.view.rule.num_experts),
        target_(params.layer + distance) {}

  // How the layer routes its own token, as Predictor::SetTargets.
  __device__ void SetTargets() const {
    float num_tokens = view_.num_tokens[target_];
    float deviation = view_.deviations[target_];
    const float length = Length();
    const Margin margin =
        MarginAt(length, SumParts());  // with barriers: no thread still reads what one writes
    if (length > 0) {
      num_tokens += 1.0f;
      deviation += DeviationRate(num_tokens) * (margin.deviation - deviation);
    }
    if (expert_ == 0) {
      view_.num_tokens[target_] = num_tokens;
      view_.deviations[target_] = deviation;
    }
    if (!is_expert_) return;
    const float sharpness = deviation > 0 ? ScoreModel::kFirstGain / deviation : 0;
    const size_t at = ExpertAt(target_);
    view_.margins[at] = margin.value;
    view_.targets[at] = Logistic(sharpness * margin.value);
  }

  // Scores and needs of a later layer, and what of it to prefetch.
  __device__ void Foresee() const {
    const float length = Length();
    const Sums sums = SumParts();
    // Needed later, and not in the cache: on their way while the margins are made.
    const auto pair = static_cast<size_t>(params_.first_pair + distance_ - 1);
    const ScoreScalars scalars = view_.scalars[pair];
    const NeedCalibration calibration = view_.calibrations[pair];
    const float seen_deviation = view_.deviations[target_];
    const bool may_be_listed = is_expert_ && !HasSlot();
    const Margin margin = MarginAt(length, sums);
    const float deviation = seen_deviation > 0 ? seen_deviation : margin.deviation;
    const float base = deviation > 0 ? margin.value / deviation : 0;
    const float product = (length > 0 ? sums.directions / length : 0) + sums.rest;
    const float score = product + scalars.gain * base;
    const float need = calibration.Probability(score);
    Keep(base, score, scalars.Schedule());
    WriteNeed(need);
    List(need, may_be_listed && need >= params_.min_need);
    Publish();
  }

 private:
  // Over the parts of the expert's rows.
  struct Sums {
    float routers = 0, directions = 0, rest = 0;
  };
  // Of what is added up one after the other, so many are on their way at once.
  static constexpr int kSumLoads = 12;

  __device__ Sums SumParts() const {
    const PredictSplit& split = params_.split;
    const int num_parts = split.NumParts(distance_);
    const int first_rest = split.routers.num_parts + split.directions.num_parts;
    const int num_experts = view_.rule.num_experts;
    const float* partial = PartialOf(params_, distance_, 0) + min(expert_, num_experts - 1);
    Sums sums;
#pragma unroll 1
    for (int first = 0; first < num_parts; first += kSumLoads) {
      float parts[kSumLoads];
#pragma unroll
      for (int i = 0; i < kSumLoads; ++i) {
        parts[i] = first + i < num_parts ? __ldcg(partial + (first + i) * num_experts) : 0;
      }
#pragma unroll
      for (int i = 0; i < kSumLoads; ++i) {
        const bool is_router = first + i < split.routers.num_parts;
        const bool is_rest = first + i >= first_rest;
        sums.routers += is_router ? parts[i] : 0;
        sums.directions += is_router || is_rest ? 0 : parts[i];
        sums.rest += is_rest ? parts[i] : 0;
      }
    }
    return sums;
  }

  // Of the router input; 0 if it is not finite.
  __device__ float Length() const {
    float power = 0;
#pragma unroll 1
    for (int part = expert_ % 32; part < params_.split.routers.num_parts; part += 32) {
      power += __ldcg(PowersOf(params_, distance_) + part);
    }
    return LengthOf(WarpSum(power));
  }

  __device__ Margin MarginAt(float length, const Sums& sums) const {
    float logit = length > 0 ? sums.routers : 0;  // else that may not be finite
    float correction = 0;
    if (is_expert_) {
      if (view_.biases != nullptr) logit += view_.biases[ExpertAt(target_)];
      if (view_.corrections != nullptr) correction = view_.corrections[ExpertAt(target_)];
    }
    return BlockRouter(view_.rule, shared_.router).ToMargin(logit, correction);
  }

  __device__ size_t ExpertAt(int layer) const {
    return static_cast<size_t>(layer * view_.rule.num_experts + expert_);
  }

  __device__ bool HasSlot() const {
    return params_.expert_slot != nullptr &&
           params_.expert_slot[ExpertAt(target_)] != SlotId::kNone;
  }

  // For the update.
  __device__ void Keep(float base, float score, float schedule) const {
    const size_t row = SourceOf(params_.layer) * static_cast<size_t>(view_.max_distance) +
                       static_cast<size_t>(distance_ - 1);
    if (expert_ == 0) view_.schedules[row] = schedule;
    if (!is_expert_) return;
    const size_t at = row * static_cast<size_t>(view_.rule.num_experts) + threadIdx.x;
    view_.base[at] = base;
    view_.scores[at] = score;
  }

  __device__ void WriteNeed(float need) const {
    if (!is_expert_) return;
    const auto at = static_cast<size_t>((distance_ - 1) * view_.rule.num_experts) + threadIdx.x;
    view_.need[at] = need;
    if (params_.host_need != nullptr) params_.host_need[at] = need;
  }

  // The most needed of the experts that are listed. Has barriers.
  __device__ void List(float need, bool is_listed) const {
    const int warp = expert_ / 32, lane = expert_ % 32;
    const unsigned listed = __ballot_sync(0xFFFFFFFFU, is_listed);
    if (lane == 0) shared_.num_listed[warp] = __popc(listed);
    __syncthreads();
    int place = __popc(listed & ((1U << lane) - 1)), num_listed = 0;
    for (int i = 0; i < kWarps; ++i) {
      if (i == warp) place += num_listed;
      num_listed += shared_.num_listed[i];
    }
    if (is_listed) shared_.candidates[place] = need;
    if (expert_ < 3) shared_.candidates[num_listed + expert_] = -INFINITY;  // so RankOf reads fours
    __syncthreads();
    if (expert_ == 0) view_.prefetch_counts[distance_ - 1] = min(num_listed, params_.list_size);
    if (!is_listed) return;
    const int rank = RankOf(shared_.candidates, (num_listed + 3) / 4 * 4, place);
    if (rank < params_.list_size) {
      view_.prefetch_ids[(distance_ - 1) * params_.list_size + rank] = expert_;
    }
  }

  // Lets the host read the needs that the block wrote before its last barrier.
  __device__ void Publish() const {
    if (params_.host_need == nullptr || expert_ != 0) return;
    __threadfence_system();
    params_.host_words[distance_ - 1] = params_.sequence;
  }

  const PredictParams& params_;
  const View& view_;
  SummaryShared& shared_;
  int distance_;
  int expert_;
  bool is_expert_;
  int target_;
};

}  // namespace expertflow::predictor
