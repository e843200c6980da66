#include "core/eviction/need_model.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace expertflow {
namespace {

constexpr int32_t kOneQ15 = (1 << 15) - 1;
constexpr int32_t kRate = 8;             // 1/128
constexpr int32_t kFrequencyShift = 3;   // averages over 8 tokens
constexpr int32_t kFrequencyWeight = 2;  // in the logit
constexpr int32_t kCarry = 5;            // of a score into the next: 5/16
constexpr int32_t kCarryShift = 4;
constexpr int32_t kVectorWidth = 16;
constexpr size_t kGroup = 16;           // rows that are summed in 16 bits
constexpr int16_t kWeightLimit = 2047;  // +-2, so that a group's sum fits

int32_t WindowOf(int32_t num_layers, int32_t num_experts, int32_t top_k, int32_t num_slots) {
  const int64_t slots_per_layer = std::min(num_slots / num_layers, num_experts);
  const int64_t rounded = (6 * slots_per_layer + top_k) / (2 * int64_t{top_k});
  return static_cast<int32_t>(std::clamp<int64_t>(rounded, 2, NeedModel::kMaxWindow));
}

int32_t RoundUp(int32_t value, int32_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

size_t Product(int32_t a, int32_t b) { return static_cast<size_t>(a) * static_cast<size_t>(b); }

// The arrays never overlap; these loops are most of the model's time.
void AddRow(int16_t* __restrict sums, const int16_t* __restrict row, int32_t width) {
  for (int32_t e = 0; e < width; ++e) sums[e] = static_cast<int16_t>(sums[e] + row[e]);
}

void StepRow(int16_t* __restrict row, const int16_t* __restrict gradient, int32_t width) {
  for (int32_t e = 0; e < width; ++e) {
    const auto weight = static_cast<int16_t>(row[e] + gradient[e]);
    row[e] = std::max<int16_t>(std::min<int16_t>(weight, kWeightLimit), -kWeightLimit);
  }
}

}  // namespace

NeedModel::NeedModel(int32_t num_layers, int32_t num_experts, int32_t top_k, int32_t num_slots)
    : num_layers_(num_layers),
      num_experts_(num_experts),
      width_(RoundUp(num_experts, kVectorWidth)),
      top_k_(top_k),
      window_(WindowOf(num_layers, num_experts, top_k, num_slots)),
      ring_(static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(window_) + 2))) {
  const size_t width = static_cast<size_t>(width_);
  const size_t num_rings = Product(num_layers, ring_);
  weights_.resize(Product(num_layers, num_experts) * kNumSources * width);
  frequency_.resize(Product(num_layers, width_));
  num_steps_.resize(static_cast<size_t>(num_layers));
  steps_.resize(num_rings);
  routed_.resize(num_rings * static_cast<size_t>(num_experts));
  probabilities_.resize(num_rings * width);
  scores_.resize(Product(num_layers, num_experts));
  logits_.resize(width);
  labels_.resize(width);
  gradient_.resize(width);
  sums_.resize(width);
  input_rows_.resize(Product(kNumSources, num_experts));
  for (int32_t i = 0; i < 2 * kSigmoidHalf; ++i) {
    const double logit = std::ldexp(i - kSigmoidHalf + 0.5, kLogitStepBits - kFractionBits);
    sigmoid_[static_cast<size_t>(i)] =
        static_cast<int16_t>(std::lround(kOneQ15 / (1.0 + std::exp(-logit))));
  }
}

int32_t NeedModel::SourceLayer(int32_t layer, int32_t source) const {
  const int32_t back = std::max(0, source - 1) % num_layers_;
  return layer >= back ? layer - back : layer - back + num_layers_;
}

size_t NeedModel::StepIndex(int32_t layer, int64_t number) const {
  return Product(layer, ring_) + static_cast<size_t>(number & (ring_ - 1));
}

std::span<const int32_t> NeedModel::Routed(int32_t layer, int64_t number) const {
  if (number < 0) return {};
  const size_t index = StepIndex(layer, number);
  if (steps_[index].number != number) return {};  // too old: its layer went on without this one
  return std::span(routed_).subspan(index * static_cast<size_t>(num_experts_),
                                    static_cast<size_t>(steps_[index].num_experts));
}

int16_t* NeedModel::WeightRow(int32_t layer, int32_t source, int32_t routed) {
  const size_t matrix = Product(layer, kNumSources) + static_cast<size_t>(source);
  const size_t row = matrix * static_cast<size_t>(num_experts_) + static_cast<size_t>(routed);
  return weights_.data() + row * static_cast<size_t>(width_);
}

const int32_t* NeedModel::Observe(int32_t layer, std::span<const int32_t> experts) {
  const int64_t number = num_steps_[static_cast<size_t>(layer)]++;
  Record(layer, number, experts);
  UpdateFrequency(layer, experts);
  if (number >= window_) Learn(layer, number);
  Score(layer, number);
  return scores(layer);
}

void NeedModel::Record(int32_t layer, int64_t number, std::span<const int32_t> experts) {
  const size_t index = StepIndex(layer, number);
  Step& step = steps_[index];
  step.number = number;
  step.num_experts = static_cast<int32_t>(experts.size());
  std::ranges::copy(
      experts, routed_.begin() + static_cast<ptrdiff_t>(index * static_cast<size_t>(num_experts_)));
  for (int32_t s = 0; s < kNumSources; ++s) {
    const int64_t latest = num_steps_[static_cast<size_t>(SourceLayer(layer, s))] - 1;
    step.source_steps[static_cast<size_t>(s)] = s == 1 ? latest - 1 : latest;
  }
}

void NeedModel::UpdateFrequency(int32_t layer, std::span<const int32_t> experts) {
  int16_t* frequency = frequency_.data() + Product(layer, width_);
  for (int32_t e = 0; e < width_; ++e) {
    frequency[e] = static_cast<int16_t>(frequency[e] - (frequency[e] >> kFrequencyShift));
  }
  for (const int32_t e : experts) {
    frequency[e] = static_cast<int16_t>(frequency[e] + (1 << (kFractionBits - kFrequencyShift)));
  }
}

std::span<int16_t* const> NeedModel::InputRows(int32_t layer, int64_t number) {
  const Step& step = steps_[StepIndex(layer, number)];
  size_t count = 0;
  for (int32_t s = 0; s < kNumSources; ++s) {
    const int64_t source_step = step.source_steps[static_cast<size_t>(s)];
    for (const int32_t e : Routed(SourceLayer(layer, s), source_step)) {
      input_rows_[count++] = WeightRow(layer, s, e);
    }
  }
  return std::span(input_rows_).first(count);
}

int32_t NeedModel::NominalInputs() const { return kNumSources * top_k_; }

void NeedModel::Learn(int32_t layer, int64_t number) {
  const int64_t past = number - window_;
  std::ranges::fill(labels_, 0);
  for (int64_t later = number; later > past; --later) {
    const auto left = static_cast<int32_t>(window_ - (later - past - 1));
    const int32_t label = left * kOneQ15 / window_;
    for (const int32_t e : Routed(layer, later)) {
      labels_[static_cast<size_t>(e)] = label;
    }
  }
  const std::span<int16_t* const> rows = InputRows(layer, past);
  const size_t index = StepIndex(layer, past);
  const int16_t* probability = probabilities_.data() + index * static_cast<size_t>(width_);
  for (size_t e = 0; e < gradient_.size(); ++e) {
    const int32_t error = labels_[e] - probability[e];
    gradient_[e] = static_cast<int16_t>((error * kRate + (1 << 14)) >> 15);
  }
  for (int16_t* row : rows) StepRow(row, gradient_.data(), width_);
}

void NeedModel::Score(int32_t layer, int64_t number) {
  const std::span<int16_t* const> rows = InputRows(layer, number);
  std::ranges::fill(logits_, 0);
  for (size_t first = 0; first < rows.size(); first += kGroup) {
    std::ranges::fill(sums_, int16_t{0});
    for (const int16_t* row : rows.subspan(first, std::min(kGroup, rows.size() - first))) {
      AddRow(sums_.data(), row, width_);
    }
    for (size_t e = 0; e < sums_.size(); ++e) logits_[e] += sums_[e];
  }
  // All experts of a batch together weigh as much as those of one token.
  const auto num_inputs = static_cast<int32_t>(rows.size());
  if (num_inputs > NominalInputs()) {
    for (int32_t& logit : logits_) {
      logit = static_cast<int32_t>(int64_t{logit} * NominalInputs() / num_inputs);
    }
  }
  const int16_t* frequency = frequency_.data() + Product(layer, width_);
  int16_t* probability =
      probabilities_.data() + StepIndex(layer, number) * static_cast<size_t>(width_);
  int32_t* score = scores_.data() + Product(layer, num_experts_);
  for (int32_t e = 0; e < num_experts_; ++e) {
    const int32_t logit = logits_[static_cast<size_t>(e)] + kFrequencyWeight * frequency[e];
    const int32_t i = std::clamp((logit >> kLogitStepBits) + kSigmoidHalf, 0, 2 * kSigmoidHalf - 1);
    probability[e] = sigmoid_[static_cast<size_t>(i)];
    score[e] = logit + ((score[e] * kCarry) >> kCarryShift);
  }
}

}  // namespace expertflow
