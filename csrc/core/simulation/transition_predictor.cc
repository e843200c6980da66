#include "core/simulation/transition_predictor.h"

#include <algorithm>
#include <functional>

namespace expertflow {
namespace {

constexpr int32_t kOne = 65535;
constexpr int32_t kRateShift = 6;             // a use counts 1/64
constexpr uint32_t kBucketMemory = 1U << 14;  // scores, after which the past counts half
constexpr int32_t kCandidatesPerTopK = 2;

}  // namespace

TransitionPredictor::TransitionPredictor(const TraceView& trace, int32_t max_distance)
    : trace_(trace), max_distance_(max_distance) {
  const auto distances = static_cast<size_t>(max_distance);
  const auto experts = static_cast<size_t>(trace.num_experts);
  const auto prior = static_cast<uint16_t>(kOne * trace.top_k / trace.num_experts);
  transitions_.assign(static_cast<size_t>(trace.num_layers) * distances * experts * experts, prior);
  scores_.assign((distances + 1) * distances * experts, prior);
  buckets_.resize(distances);
  needed_.assign(experts, 0);
  ranked_.resize(experts);
}

uint16_t* TransitionPredictor::Row(int32_t layer, int32_t distance, uint16_t expert) {
  const int64_t row = (int64_t{layer} * max_distance_ + distance - 1) * trace_.num_experts + expert;
  return transitions_.data() + row * trace_.num_experts;
}

uint16_t* TransitionPredictor::Scores(int64_t step, int32_t distance) {
  const int64_t row = step % (max_distance_ + 1) * max_distance_ + distance - 1;
  return scores_.data() + row * trace_.num_experts;
}

void TransitionPredictor::Learn(int64_t step) {
  for (const uint16_t expert : trace_.experts(step)) needed_[expert] = 1;
  for (int32_t d = 1; d <= max_distance_ && d <= step; ++d) {
    LearnCalibration(step - d, d);
    LearnTransitions(step - d, d);
  }
  for (const uint16_t expert : trace_.experts(step)) needed_[expert] = 0;
  for (int32_t d = 1; d <= max_distance_; ++d) Score(step, d);
}

void TransitionPredictor::LearnTransitions(int64_t step, int32_t distance) {
  for (const uint16_t expert : trace_.experts(step)) {
    uint16_t* row = Row(trace_.LayerOf(step), distance, expert);
    for (int32_t e = 0; e < trace_.num_experts; ++e) {
      const int32_t target = needed_[static_cast<size_t>(e)] * kOne;
      row[e] = static_cast<uint16_t>(row[e] + ((target - row[e]) >> kRateShift));
    }
  }
}

void TransitionPredictor::LearnCalibration(int64_t step, int32_t distance) {
  const uint16_t* scores = Scores(step, distance);
  auto& buckets = buckets_[static_cast<size_t>(distance - 1)];
  for (int32_t e = 0; e < trace_.num_experts; ++e) {
    Bucket& bucket = buckets[static_cast<size_t>(scores[e]) * kNumBuckets / (kOne + 1)];
    ++bucket.num_scored;
    bucket.num_needed += needed_[static_cast<size_t>(e)];
    if (bucket.num_scored < kBucketMemory) continue;
    bucket.num_scored /= 2;
    bucket.num_needed /= 2;
  }
}

void TransitionPredictor::Score(int64_t step, int32_t distance) {
  const auto experts = trace_.experts(step);
  uint16_t* scores = Scores(step, distance);
  const auto num_rows = static_cast<uint32_t>(experts.size());
  for (int32_t e = 0; e < trace_.num_experts; ++e) {
    uint32_t sum = 0;
    for (const uint16_t expert : experts) sum += Row(trace_.LayerOf(step), distance, expert)[e];
    scores[e] = static_cast<uint16_t>(sum / num_rows);
  }
}

float TransitionPredictor::NeedOf(int32_t distance, uint16_t score) const {
  const Bucket& bucket = buckets_[static_cast<size_t>(distance - 1)]
                                 [static_cast<size_t>(score) * kNumBuckets / (kOne + 1)];
  return static_cast<float>(bucket.num_needed) / static_cast<float>(bucket.num_scored + 1);
}

void TransitionPredictor::Predict(int64_t step, int32_t max_distance,
                                  std::vector<Prediction>& out) {
  const auto num_candidates =
      static_cast<ptrdiff_t>(std::min(kCandidatesPerTopK * trace_.top_k, trace_.num_experts));
  for (int32_t d = 1; d <= std::min(max_distance, max_distance_); ++d) {
    const uint16_t* scores = Scores(step, d);
    for (int32_t e = 0; e < trace_.num_experts; ++e) {  // the higher score, then the lower id
      ranked_[static_cast<size_t>(e)] = uint32_t{scores[e]} << 16 | static_cast<uint32_t>(kOne - e);
    }
    const auto end = ranked_.begin() + num_candidates;
    std::partial_sort(ranked_.begin(), end, ranked_.end(), std::greater<>());
    for (auto rank = ranked_.begin(); rank != end; ++rank) {
      const auto score = static_cast<uint16_t>(*rank >> 16);
      out.push_back({d, kOne - static_cast<int32_t>(*rank & kOne), NeedOf(d, score)});
    }
  }
}

}  // namespace expertflow
