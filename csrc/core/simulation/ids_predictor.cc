#include "core/simulation/ids_predictor.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "core/predictor/feature_scales.h"
#include "core/predictor/vector_math.h"

namespace expertflow {
namespace {

enum Feature : size_t { kFrequency, kConstant, kSoftVote, kSharpVote };
constexpr std::array kFirstGains = {0.5F, 0.0F, 0.25F, 0.25F};
constexpr float kSoft = 1.2F;
constexpr float kSharp = 4.0F;

constexpr float kFrequencyRate = 1.0F / 200;
constexpr float kWeightRate = 1.2F;  // over the number of inputs
constexpr float kGainRate = 0.005F;
constexpr float kLeastNeed = 1.0F / 64;  // nothing admits less

float LogOdds(float probability) {
  const float p = std::clamp(probability, 1e-4F, 1.0F - 1e-4F);
  return std::log(p / (1.0F - p));
}

// out += scale * values
void Add(std::span<float> out, float scale, const float* values) {
  AddOuterProduct(out.data(), 1, out.size(), &scale, values, out.size());
}

}  // namespace

IdsPredictor::IdsPredictor(const TraceView& trace, int32_t max_distance)
    : trace_(trace),
      max_distance_(max_distance),
      num_experts_(static_cast<size_t>(trace.num_experts)),
      memory_(trace) {
  const auto layers = static_cast<size_t>(trace.num_layers);
  const auto distances = static_cast<size_t>(max_distance);
  frequency_.assign(layers * num_experts_,
                    static_cast<float>(trace.top_k) / static_cast<float>(trace.num_experts));
  weights_.assign(layers * distances * kNumSources * num_experts_ * num_experts_, 0.0F);
  gains_.assign(layers * distances, {kFirstGains, {}});
  foreseen_.resize((distances + 1) * distances);
  for (Foreseen& foreseen : foreseen_) {
    foreseen.features.assign(kNumFeatures * num_experts_, 1.0F);
    foreseen.need.resize(num_experts_);
  }
  used_.resize(num_experts_);
  error_.resize(num_experts_);
  ranked_.resize(num_experts_);
}

size_t IdsPredictor::PairOf(int64_t step, int32_t distance) const {
  return static_cast<size_t>(trace_.LayerOf(step) * max_distance_ + distance - 1);
}

IdsPredictor::Foreseen& IdsPredictor::ForeseenAt(int64_t step, int32_t distance) {
  return foreseen_[static_cast<size_t>(step % (max_distance_ + 1) * max_distance_ + distance - 1)];
}

template <class Visit>
void IdsPredictor::ForEachRow(int64_t step, int32_t distance, Visit&& visit) {
  const size_t first = PairOf(step, distance) * kNumSources;
  for (int64_t source = 0; source < std::min(kNumSources, step + 1); ++source) {
    for (const uint16_t expert : trace_.experts(step - source)) {
      const size_t row = (first + static_cast<size_t>(source)) * num_experts_ + expert;
      visit(std::span(weights_).subspan(row * num_experts_, num_experts_));
    }
  }
}

void IdsPredictor::Learn(int64_t step) {
  std::ranges::fill(used_, 0.0F);
  for (const uint16_t expert : trace_.experts(step)) used_[expert] = 1.0F;
  for (int32_t d = 1; d <= std::min<int64_t>(max_distance_, step); ++d) LearnFrom(step - d, d);
  LearnUse(step);
  memory_.Observe(step);
  for (int32_t d = 1; d <= max_distance_; ++d) Score(step, d);
}

void IdsPredictor::LearnUse(int64_t step) {
  float* frequency = frequency_.data() + static_cast<size_t>(trace_.LayerOf(step)) * num_experts_;
  const auto tokens = static_cast<float>(trace_.TokenOf(step));
  const float rate = std::max(kFrequencyRate, 1.0F / (tokens + 2.0F));
  for (size_t e = 0; e < num_experts_; ++e) frequency[e] += rate * (used_[e] - frequency[e]);
}

void IdsPredictor::LearnFrom(int64_t step, int32_t distance) {
  const Foreseen& foreseen = ForeseenAt(step, distance);
  for (size_t e = 0; e < num_experts_; ++e) error_[e] = used_[e] - foreseen.need[e];
  LearnGains(step, distance);
  const auto tokens = static_cast<float>(trace_.TokenOf(step));
  const float rate = kWeightRate / static_cast<float>(kNumSources * trace_.top_k) *
                     std::max(0.5F, 1.0F / std::sqrt(1.0F + tokens / 1000.0F));
  ForEachRow(step, distance, [&](std::span<float> row) { Add(row, rate, error_.data()); });
}

void IdsPredictor::LearnGains(int64_t step, int32_t distance) {
  Gains& gains = gains_[PairOf(step, distance)];
  const auto tokens = static_cast<float>(trace_.TokenOf(step));
  const float rate = kGainRate * std::max(0.1F, 1.0F / std::sqrt(1.0F + tokens / 50.0F));
  const float* feature = ForeseenAt(step, distance).features.data();
  for (size_t f = 0; f < kNumFeatures; ++f, feature += num_experts_) {
    const float gradient = std::inner_product(error_.begin(), error_.end(), feature, 0.0F);
    gains.power[f] +=
        std::max(0.001F, 1.0F / (tokens + 1.0F)) * (gradient * gradient - gains.power[f]);
    gains.gain[f] += rate * gradient / std::sqrt(gains.power[f] + 1e-9F);
  }
}

void IdsPredictor::Score(int64_t step, int32_t distance) {
  Foreseen& foreseen = ForeseenAt(step, distance);
  const auto target = static_cast<size_t>(trace_.LayerOf(step + distance));
  const auto frequency =
      std::span<const float>(frequency_).subspan(target * num_experts_, num_experts_);
  const auto feature = [&](Feature f) {
    return std::span(foreseen.features).subspan(f * num_experts_, num_experts_);
  };
  memory_.Vote(distance, kSoft, frequency, feature(kSoftVote));
  memory_.Vote(distance, kSharp, frequency, feature(kSharpVote));
  std::ranges::copy(frequency, feature(kFrequency).begin());
  for (const Feature f : {kFrequency, kSoftVote, kSharpVote}) {
    std::ranges::transform(feature(f), feature(f).begin(), LogOdds);
  }
  const Gains& gains = gains_[PairOf(step, distance)];
  std::ranges::fill(foreseen.need, 0.0F);
  for (size_t f = 0; f < kNumFeatures; ++f) {
    Add(foreseen.need, gains.gain[f], feature(static_cast<Feature>(f)).data());
  }
  ForEachRow(step, distance, [&](std::span<float> row) { Add(foreseen.need, 1.0F, row.data()); });
  for (float& need : foreseen.need) need = Logistic(need);
}

void IdsPredictor::Predict(int64_t step, int32_t max_distance, std::vector<Prediction>& out) {
  for (int32_t d = 1; d <= std::min(max_distance, max_distance_); ++d) {
    const std::vector<float>& need = ForeseenAt(step, d).need;
    std::iota(ranked_.begin(), ranked_.end(), 0);
    std::ranges::stable_sort(ranked_, std::ranges::greater(),
                             [&](int32_t e) { return need[static_cast<size_t>(e)]; });
    for (int32_t rank = 0; rank < trace_.num_experts; ++rank) {
      const int32_t expert = ranked_[static_cast<size_t>(rank)];
      const float p = need[static_cast<size_t>(expert)];
      if (rank >= trace_.top_k && p < kLeastNeed) break;
      out.push_back({d, expert, p});
    }
  }
}

}  // namespace expertflow
