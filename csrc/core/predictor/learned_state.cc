#include "core/predictor/learned_state.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace expertflow {
namespace {

constexpr size_t kAlignFloats = 16;

}  // namespace

void PredictorConfig::Check() const {
  rule.Check();
  if (num_layers < 1 || hidden < 1 || max_distance < 1 || num_token_buckets < 0) {
    throw std::invalid_argument("a predictor cannot have " + std::to_string(num_layers) +
                                " layers, hidden size " + std::to_string(hidden) + ", distance " +
                                std::to_string(max_distance) + " and " +
                                std::to_string(num_token_buckets) + " token buckets");
  }
}

LearnedState::LearnedState(const PredictorConfig& config) {
  config.Check();
  const auto num_layers = static_cast<size_t>(config.num_layers);
  num_experts = static_cast<size_t>(config.rule.num_experts);
  num_buckets = static_cast<size_t>(config.num_token_buckets);
  const size_t used = 2 * static_cast<size_t>(config.hidden) + num_experts + 1;
  num_features = (used + kAlignFloats - 1) / kAlignFloats * kAlignFloats;
  first_pair.push_back(0);
  for (size_t source = 0; source <= num_layers; ++source) {
    const size_t ahead = std::min(static_cast<size_t>(config.max_distance), num_layers - source);
    first_pair.push_back(first_pair.back() + ahead);
  }
  const size_t num_pairs = first_pair.back();
  weights.assign(num_pairs * num_experts * num_features, 0.0f);
  scalars.assign(num_pairs, ScoreScalars{.gain = ScoreModel::kFirstGain});
  calibrations.assign(num_pairs, NeedCalibration{});
  token_means.assign(num_layers * num_buckets * num_experts, 0.0f);
  token_counts.assign(num_layers * num_buckets, 0.0f);
  deviations.assign(num_layers, 0.0f);
  num_tokens.assign(num_layers, 0.0f);
}

}  // namespace expertflow
