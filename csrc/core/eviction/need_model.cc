#include "core/eviction/need_model.h"

#include <algorithm>

namespace expertflow {
namespace {

constexpr size_t kGroup = 16;  // rows that are summed in 16 bits

// The arrays never overlap; these loops are most of the model's time.
void AddRow(int16_t* __restrict sums, const int16_t* __restrict row, int32_t width) {
  for (int32_t e = 0; e < width; ++e) sums[e] = static_cast<int16_t>(sums[e] + row[e]);
}

void StepRow(int16_t* __restrict row, const int16_t* __restrict gradient, int32_t width) {
  for (int32_t e = 0; e < width; ++e) row[e] = NeedRules::Stepped(row[e], gradient[e]);
}

}  // namespace

NeedModel::NeedModel(int32_t num_layers, int32_t num_experts, int32_t top_k, int32_t num_slots)
    : arrays_(num_layers, num_experts, top_k, num_slots), state_(arrays_.state()) {
  const auto width = static_cast<size_t>(state_.width);
  logits_.resize(width);
  labels_.resize(width);
  gradient_.resize(width);
  sums_.resize(width);
  input_rows_.resize(static_cast<size_t>(kNumSources) * static_cast<size_t>(num_experts));
}

std::span<const int32_t> NeedModel::Routed(int32_t layer, int64_t number) const {
  const NeedStep* step = state_.Step(layer, number);
  if (step == nullptr) return {};
  return {state_.Routed(layer, number), static_cast<size_t>(step->num_experts)};
}

const int32_t* NeedModel::Observe(int32_t layer, std::span<const int32_t> experts) {
  const int64_t number = state_.num_steps[layer]++;
  Record(layer, number, experts);
  UpdateFrequency(layer, experts);
  ScoreAll(layer, number);
  if (number >= state_.window) Learn(layer, number);
  return scores(layer);
}

void NeedModel::Record(int32_t layer, int64_t number, std::span<const int32_t> experts) {
  NeedStep& step = state_.steps[state_.StepIndex(layer, number)];
  step.number = number;
  step.num_experts = static_cast<int32_t>(experts.size());
  std::ranges::copy(experts, state_.Routed(layer, number));
  for (int32_t s = 0; s < kNumSources; ++s) {
    const int64_t latest = state_.num_steps[state_.SourceLayer(layer, s)] - 1;
    step.source_steps[s] = s == 1 ? latest - 1 : latest;
  }
}

void NeedModel::UpdateFrequency(int32_t layer, std::span<const int32_t> experts) {
  int16_t* frequency = state_.frequency + static_cast<ptrdiff_t>(layer) * state_.width;
  for (int32_t e = 0; e < state_.width; ++e) frequency[e] = Decayed(frequency[e]);
  for (const int32_t e : experts) frequency[e] = static_cast<int16_t>(frequency[e] + kUse);
}

std::span<int16_t* const> NeedModel::InputRows(int32_t layer, int64_t number) {
  const NeedStep& step = state_.steps[state_.StepIndex(layer, number)];
  size_t count = 0;
  for (int32_t s = 0; s < kNumSources; ++s) {
    for (const int32_t e : Routed(state_.SourceLayer(layer, s), step.source_steps[s])) {
      input_rows_[count++] = state_.Weights(state_.WeightRow(layer, s, e));
    }
  }
  return std::span(input_rows_).first(count);
}

void NeedModel::Learn(int32_t layer, int64_t number) {
  const int64_t past = number - state_.window;
  std::ranges::fill(labels_, 0);
  for (int64_t later = number; later > past; --later) {
    const int32_t label = Label(static_cast<int32_t>(later - past), state_.window);
    for (const int32_t e : Routed(layer, later)) labels_[static_cast<size_t>(e)] = label;
  }
  const int16_t* foreseen = state_.Foreseen(layer, past);
  for (size_t e = 0; e < gradient_.size(); ++e) {
    gradient_[e] = Gradient(labels_[e], state_.sigmoid[foreseen[e]]);
  }
  for (int16_t* row : InputRows(layer, past)) StepRow(row, gradient_.data(), state_.width);
}

void NeedModel::ScoreAll(int32_t layer, int64_t number) {
  const std::span<int16_t* const> rows = InputRows(layer, number);
  std::ranges::fill(logits_, 0);
  for (size_t first = 0; first < rows.size(); first += kGroup) {
    std::ranges::fill(sums_, int16_t{0});
    for (const int16_t* row : rows.subspan(first, std::min(kGroup, rows.size() - first))) {
      AddRow(sums_.data(), row, state_.width);
    }
    for (size_t e = 0; e < sums_.size(); ++e) logits_[e] += sums_[e];
  }
  const auto num_inputs = static_cast<int32_t>(rows.size());
  const int16_t* frequency = state_.frequency + static_cast<ptrdiff_t>(layer) * state_.width;
  int16_t* foreseen = state_.Foreseen(layer, number);
  int32_t* score = state_.scores + static_cast<ptrdiff_t>(layer) * state_.num_experts;
  for (int32_t e = 0; e < state_.num_experts; ++e) {
    const int32_t logit =
        Logit(logits_[static_cast<size_t>(e)], num_inputs, state_.top_k, frequency[e]);
    foreseen[e] = SigmoidIndex(logit);
    score[e] = Score(logit, score[e]);
  }
}

}  // namespace expertflow
