#include "core/predictor/predictor.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/predictor/feature_scales.h"
#include "core/predictor/vector_math.h"

namespace expertflow {
namespace {

void CheckSize(size_t found, size_t expected, bool may_be_empty, const char* name) {
  if (found == expected || (may_be_empty && found == 0)) return;
  throw std::invalid_argument(std::string(name) + " of the routers have " + std::to_string(found) +
                              " values, expected " + std::to_string(expected));
}

}  // namespace

Predictor::Predictor(const PredictorConfig& config, RouterWeights routers)
    : config_(config),
      routers_(std::move(routers)),
      state_(config),
      router_(config.rule),
      num_layers_(static_cast<size_t>(config.num_layers)),
      num_experts_(state_.num_experts),
      hidden_(static_cast<size_t>(config.hidden)),
      sources_(SourceOf(config.num_layers)),
      need_(static_cast<size_t>(config.max_distance) * num_experts_),
      features_(state_.num_features),
      margins_(num_experts_),
      targets_(num_experts_) {
  const size_t num_values = num_layers_ * num_experts_;
  CheckSize(routers_.weights.size(), num_values * hidden_, false, "weights");
  CheckSize(routers_.biases.size(), num_values, true, "biases");
  CheckSize(routers_.corrections.size(), num_values, true, "correction biases");
}

void Predictor::BeginPass(int32_t num_sequences, int32_t rows_per_sequence,
                          std::span<const int64_t> tokens) {
  if (num_sequences < 1 || rows_per_sequence < 1) {
    throw std::invalid_argument("a pass needs at least one sequence of one row");
  }
  const auto sequences = static_cast<size_t>(num_sequences);
  const size_t num_rows = sequences * static_cast<size_t>(rows_per_sequence);
  if (!tokens.empty() && tokens.size() != num_rows) {
    throw std::invalid_argument(std::to_string(tokens.size()) + " token ids for a pass of " +
                                std::to_string(num_rows) + " rows");
  }
  if (sequences != num_sequences_) {
    for (Layer& layer : sources_) layer.previous.assign(sequences * hidden_, 0.0f);
  }
  num_sequences_ = sequences;
  rows_per_sequence_ = static_cast<size_t>(rows_per_sequence);
  num_rows_ = num_rows;
  ++pass_;
  buckets_.clear();
  if (config_.num_token_buckets == 0) return;
  for (const int64_t token : tokens) {
    if (token < 0) throw std::invalid_argument("a token id is negative");
    buckets_.push_back(token % config_.num_token_buckets);
  }
}

void Predictor::Observe(int32_t layer, std::span<const float> hidden) {
  CheckLayer(layer, kTokenStart);
  if (num_rows_ == 0 || hidden.size() != num_rows_ * hidden_) {
    throw std::invalid_argument("the pass has " + std::to_string(num_rows_) + " rows of " +
                                std::to_string(hidden_) + " values, got " +
                                std::to_string(hidden.size()) + " values");
  }
  Layer& seen = At(layer);
  seen.directions.resize(hidden.size());
  seen.lengths.resize(num_rows_);
  for (size_t row = 0; row < num_rows_; ++row) {
    const float* values = hidden.data() + row * hidden_;
    float power = 0.0f;
    MatrixVector(values, 1, hidden_, values, hidden_, &power);
    const float length = std::sqrt(power);
    const bool is_usable = std::isfinite(length) && length > 0.0f;
    seen.lengths[row] = is_usable ? length : 0.0f;
    for (size_t i = 0; i < hidden_; ++i) {
      seen.directions[row * hidden_ + i] = is_usable ? values[i] / length : 0.0f;
    }
  }
  seen.pass = pass_;
}

void Predictor::Predict(int32_t layer, int32_t max_distance) {
  CheckObserved(layer, kTokenStart);
  Layer& from = At(layer);
  num_distances_ =
      std::clamp(max_distance, 0, std::min(config_.max_distance, config_.num_layers - 1 - layer));
  from.num_distances = num_distances_;
  last_layer_ = layer;
  const auto num_distances = static_cast<size_t>(num_distances_);
  from.base.resize(num_distances * num_rows_ * num_experts_);
  from.scores.resize(from.base.size());
  from.predicted_pass = pass_;
  for (size_t distance = 1; distance <= num_distances; ++distance) {
    const NeedCalibration& calibration = state_.calibrations[state_.Pair(layer, distance)];
    float* need = need_.data() + (distance - 1) * num_experts_;
    std::fill_n(need, num_experts_, 1.0f);  // that no row needs it
    for (size_t row = 0; row < num_rows_; ++row) {
      PredictRow(layer, distance, row);
      const std::span<const float> scores = Block(from.scores, distance, row);
      for (size_t e = 0; e < num_experts_; ++e)
        need[e] *= 1.0f - calibration.Probability(scores[e]);
    }
    for (size_t e = 0; e < num_experts_; ++e) need[e] = 1.0f - need[e];
  }
}

void Predictor::PredictRow(int32_t layer, size_t distance, size_t row) {
  Layer& from = At(layer);
  const auto target = static_cast<size_t>(layer + static_cast<int32_t>(distance));
  const std::span<float> base = Block(from.base, distance, row);
  const float own_deviation = Margins(target, from, row, base);
  const float seen_deviation = state_.deviations[target];
  const float deviation = seen_deviation > 0.0f ? seen_deviation : own_deviation;
  for (float& value : base) value = deviation > 0.0f ? value / deviation : 0.0f;
  FillFeatures(Direction(from, row), Previous(target, row, false), target, row);
  Model(state_.Pair(layer, distance)).Score(features_, base, Block(from.scores, distance, row));
}

void Predictor::Learn(int32_t layer) {
  CheckObserved(layer, 0);
  Layer& seen = At(layer);
  for (size_t row = 0; row < num_rows_; ++row) {
    if (seen.lengths[row] > 0.0f) LearnRow(layer, row);
  }
  for (size_t sequence = 0; sequence < num_sequences_; ++sequence) {
    const size_t last_row = (sequence + 1) * rows_per_sequence_ - 1;
    std::ranges::copy(Direction(seen, last_row), seen.previous.data() + sequence * hidden_);
  }
}

void Predictor::LearnRow(int32_t layer, size_t row) {
  const auto index = static_cast<size_t>(layer);
  SetTargets(index, row);
  const int32_t farthest = std::max(kTokenStart, layer - config_.max_distance);
  for (int32_t source = layer - 1; source >= farthest; --source) {
    Layer& from = At(source);
    if (from.predicted_pass != pass_ || from.lengths[row] == 0.0f) continue;
    if (layer - source > from.num_distances) continue;
    const auto distance = static_cast<size_t>(layer - source);
    const size_t pair = state_.Pair(source, distance);
    const std::span<const float> base = Block(from.base, distance, row);
    const std::span<float> scores = Block(from.scores, distance, row);
    FillFeatures(Direction(from, row), Previous(index, row, true), index, row);
    // With one row nothing was learned since Predict, so its scores still hold.
    if (num_rows_ > 1) Model(pair).Score(features_, base, scores);
    CalibrationStep step;
    for (size_t e = 0; e < num_experts_; ++e) {
      step.Add(state_.calibrations[pair], scores[e], margins_[e] > 0.0f);
    }
    step.Apply(state_.calibrations[pair]);
    Model(pair).Learn(features_, base, targets_, scores);
  }
  RememberToken(index, row);
}

void Predictor::SetTargets(size_t layer, size_t row) {
  const float own_deviation = Margins(layer, At(static_cast<int32_t>(layer)), row, margins_);
  float& deviation = state_.deviations[layer];
  float& num_tokens = state_.num_tokens[layer];
  num_tokens += 1.0f;
  deviation += DeviationRate(num_tokens) * (own_deviation - deviation);
  const float sharpness = deviation > 0.0f ? ScoreModel::kFirstGain / deviation : 0.0f;
  for (size_t e = 0; e < num_experts_; ++e) targets_[e] = Logistic(sharpness * margins_[e]);
}

float Predictor::Margins(size_t layer, const Layer& from, size_t row, std::span<float> margins) {
  const size_t first = layer * num_experts_;
  MatrixVector(routers_.weights.data() + first * hidden_, num_experts_, hidden_,
               Direction(from, row).data(), hidden_, margins.data());
  for (size_t e = 0; e < num_experts_; ++e) {
    margins[e] *= from.lengths[row];
    if (!routers_.biases.empty()) margins[e] += routers_.biases[first + e];
  }
  const std::span<const float> corrections = routers_.corrections;
  return router_.ToMargins(
      margins, corrections.empty() ? corrections : corrections.subspan(first, num_experts_));
}

void Predictor::FillFeatures(std::span<const float> direction, std::span<const float> previous,
                             size_t target, size_t row) {
  float* out = std::ranges::copy(direction, features_.data()).out;
  if (previous.empty()) {
    out = std::fill_n(out, hidden_, 0.0f);
  } else {
    for (const float value : previous) *out++ = kPreviousScale * value;
  }
  if (buckets_.empty()) {
    out = std::fill_n(out, num_experts_, 0.0f);
  } else {
    const auto bucket = static_cast<size_t>(buckets_[row]);
    for (const float value : state_.TokenMean(target, bucket)) *out++ = kTokenScale * value;
  }
  *out = kBiasFeature;
}

void Predictor::RememberToken(size_t layer, size_t row) {
  if (buckets_.empty()) return;
  const auto bucket = static_cast<size_t>(buckets_[row]);
  float& count = state_.token_counts[layer * state_.num_buckets + bucket];
  count += 1.0f;
  const float rate = TokenRate(count);
  const float usual =
      static_cast<float>(config_.rule.top_k) / static_cast<float>(config_.rule.num_experts);
  const std::span<float> mean = state_.TokenMean(layer, bucket);
  for (size_t e = 0; e < num_experts_; ++e) mean[e] += rate * (targets_[e] - usual - mean[e]);
}

std::span<const float> Predictor::need(int32_t distance) const {
  if (distance < 1 || distance > num_distances_) {
    throw std::out_of_range("distance " + std::to_string(distance) + " of " +
                            std::to_string(num_distances_) + " that were predicted");
  }
  return {need_.data() + static_cast<size_t>(distance - 1) * num_experts_, num_experts_};
}

std::span<const float> Predictor::scores(int32_t distance) const {
  const size_t size = need(distance).size() * num_rows_;
  const Layer& from = At(last_layer_);
  return {from.scores.data() + static_cast<size_t>(distance - 1) * size, size};
}

void Predictor::Rank(int32_t distance, std::span<int32_t> experts) const {
  const std::span<const float> needs = need(distance);
  if (experts.size() > num_experts_) throw std::invalid_argument("more experts than a layer has");
  std::vector<int32_t> order(num_experts_);
  std::iota(order.begin(), order.end(), 0);
  const auto end = order.begin() + static_cast<std::ptrdiff_t>(experts.size());
  std::partial_sort(order.begin(), end, order.end(), [&](int32_t a, int32_t b) {
    const float need_a = needs[static_cast<size_t>(a)], need_b = needs[static_cast<size_t>(b)];
    return need_a != need_b ? need_a > need_b : a < b;
  });
  std::copy(order.begin(), end, experts.begin());
}

void Predictor::CheckLayer(int32_t layer, int32_t first) const {
  if (layer >= first && layer < config_.num_layers) return;
  throw std::out_of_range("layer " + std::to_string(layer) + " is not one of the predictor's " +
                          std::to_string(num_layers_));
}

void Predictor::CheckObserved(int32_t layer, int32_t first) const {
  if (layer >= first && layer < config_.num_layers && At(layer).pass == pass_) return;
  throw std::logic_error("layer " + std::to_string(layer) + " was not observed in this pass");
}

std::span<const float> Predictor::Direction(const Layer& layer, size_t row) const {
  return {layer.directions.data() + row * hidden_, hidden_};
}

// Empty if unknown: within a pass the row before is known at `target` only once that has run.
std::span<const float> Predictor::Previous(size_t target, size_t row, bool is_known) const {
  const Layer& layer = At(static_cast<int32_t>(target));
  if (row % rows_per_sequence_ == 0) {
    return {layer.previous.data() + row / rows_per_sequence_ * hidden_, hidden_};
  }
  return is_known ? Direction(layer, row - 1) : std::span<const float>();
}

std::span<float> Predictor::Block(std::vector<float>& values, size_t distance, size_t row) const {
  return {values.data() + ((distance - 1) * num_rows_ + row) * num_experts_, num_experts_};
}

ScoreModel Predictor::Model(size_t pair) { return {state_.Weights(pair), state_.scalars[pair]}; }

}  // namespace expertflow
