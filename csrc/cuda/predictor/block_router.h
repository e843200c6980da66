#pragma once

#include <cmath>

#include "core/predictor/feature_scales.h"
#include "cuda/predictor/block_sum.h"

// A family's routing by a block, thread e for expert e; threads beyond the experts come along.

namespace expertflow::predictor {

struct RouterShared {
  SumScratch sums, square_sums;
  alignas(16) float scores[kMaxExperts];
  float group_scores[2][kMaxExperts];  // the best and the second best of each group
  float last, next;                    // around the border
};

// How many of the `count` values are before the one of index e, the larger first, then the lower
// index. `count` is a multiple of 4.
__device__ inline int RankOf(const float* values, int count, int e) {
  const float own = values[e];
  const int own_four = e / 4 * 4;
  int rank = 0;
#pragma unroll 4
  for (int i = 0; i < own_four; i += 4) {
    const float4 other = *reinterpret_cast<const float4*>(values + i);
    rank += (other.x >= own) + (other.y >= own) + (other.z >= own) + (other.w >= own);
  }
#pragma unroll 4
  for (int i = own_four; i < count; i += 4) {
    const float4 other = *reinterpret_cast<const float4*>(values + i);
    rank += (other.x > own) + (other.y > own) + (other.z > own) + (other.w > own);
  }
  for (int i = own_four; i < e; ++i) rank += values[i] == own;
  return rank;
}

struct Margin {
  float value;
  float deviation;  // of the selection scores over the experts
};

class BlockRouter {
 public:
  __device__ BlockRouter(const RoutingRule& rule, RouterShared& shared)
      : rule_(rule),
        shared_(shared),
        expert_(static_cast<int>(threadIdx.x)),
        is_expert_(expert_ < rule.num_experts) {}

  // As Router::ToMargins.
  __device__ Margin ToMargin(float logit, float correction) {
    const float score = rule_.is_sigmoid ? Logistic(logit) + correction : logit;
    shared_.scores[expert_] = is_expert_ ? score : -INFINITY;
    if (expert_ == 0) shared_.last = shared_.next = 0;
    const float deviation = Deviation(score);
    bool is_eligible = is_expert_;
    if (rule_.num_groups > 1) {
      is_eligible = IsInChosenGroup() && is_expert_;
      if (!is_eligible) shared_.scores[expert_] = -INFINITY;
      __syncthreads();
    }
    if (is_eligible) {
      const int rank = RankOf(shared_.scores, (rule_.num_experts + 3) / 4 * 4, expert_);
      if (rank == rule_.top_k - 1) shared_.last = score;
      if (rank == rule_.top_k) shared_.next = score;
    }
    const int num_eligible = __syncthreads_count(is_eligible);
    const float border = num_eligible > rule_.top_k ? 0.5f * (shared_.last + shared_.next)
                                                    : shared_.last - deviation;
    const float margin = score - border;
    return {is_eligible ? margin : fminf(margin, 0) - kOutsideGroups * deviation, deviation};
  }

 private:
  // Has barriers.
  __device__ float Deviation(float score) {
    const auto count = static_cast<float>(rule_.num_experts);
    const float mean = BlockSum(is_expert_ ? score : 0, shared_.sums) / count;
    const float distance = is_expert_ ? score - mean : 0;
    return sqrtf(BlockSum(distance * distance, shared_.square_sums) / count);
  }

  // Ends with all threads past their reads of the scores.
  __device__ bool IsInChosenGroup() {
    const int size = rule_.num_experts / rule_.num_groups;
    const int group = expert_ / size;
    if (is_expert_) {
      const float own = shared_.scores[expert_];
      int rank = 0;
      for (int i = group * size; i < (group + 1) * size; ++i) {
        rank += shared_.scores[i] > own || (shared_.scores[i] == own && i < expert_);
      }
      if (rank < 2) shared_.group_scores[rank][group] = own;
    }
    __syncthreads();
    int num_better = 0;
    if (is_expert_) {
      const float own = GroupScore(group, size);
      for (int i = 0; i < rule_.num_groups; ++i) num_better += GroupScore(i, size) > own;
    }
    return num_better < rule_.top_groups;
  }

  __device__ float GroupScore(int group, int size) const {
    const float best = shared_.group_scores[0][group];
    return rule_.is_sigmoid && size > 1 ? best + shared_.group_scores[1][group] : best;
  }

  const RoutingRule& rule_;
  RouterShared& shared_;
  int expert_;
  bool is_expert_;
};

}  // namespace expertflow::predictor
