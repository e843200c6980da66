#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/host_device.h"
#include "core/ids.h"
#include "core/slot_table.h"

// What NeedModel (eviction/need_model.h) keeps, as plain data in host or device memory, and what it
// does to one weight or one expert. The model on the host and the one in the planner kernel
// (core/block_need_step.h) are made of these functions, in integers: so they agree bit by bit,
// whatever the order of their sums.

namespace expertflow {

struct NeedRules {
  static constexpr int32_t kLayersBack = 3;
  static constexpr int32_t kNumSources = 2 + kLayersBack;
  // Of weights, frequencies, logits and scores. A step of the weights is rounded to this, so errors
  // below 1/64 teach nothing: with 10 bits it was 1/16, and experts used more rarely looked alike.
  static constexpr int32_t kFractionBits = 12;
  static constexpr int32_t kMaxWindow = 32;
  static constexpr int32_t kLogitStepBits = 7;  // the sigmoid is tabulated at 1/32
  static constexpr int32_t kSigmoidHalf = 256;  // and up to +-8
  static constexpr int32_t kVectorWidth = 16;
  static constexpr int16_t kWeightLimit = 2047;  // +-1/2, so that 16 fit a sum of 16 bits

  static constexpr int32_t kFrequencyShift = 3;                            // averages over 8 tokens
  static constexpr int32_t kUse = 1 << (kFractionBits - kFrequencyShift);  // more frequency

  EXPERTFLOW_HD static int16_t Decayed(int16_t frequency) {
    return static_cast<int16_t>(frequency - (frequency >> kFrequencyShift));
  }

  // The need, 15 fraction bits as probabilities have, of an expert whose next use comes `distance`
  // tokens later.
  EXPERTFLOW_HD static int32_t Label(int32_t distance, int32_t window) {
    return (window - distance + 1) * kOneQ15 / window;
  }

  EXPERTFLOW_HD static int16_t Gradient(int32_t label, int16_t probability) {
    constexpr int32_t kRate = 1 << (kFractionBits - 7);  // 1/128
    return static_cast<int16_t>(((label - probability) * kRate + (1 << 14)) >> 15);
  }

  EXPERTFLOW_HD static int16_t Stepped(int16_t weight, int16_t gradient) {
    const auto stepped = static_cast<int16_t>(weight + gradient);
    const int16_t limited = stepped < kWeightLimit ? stepped : kWeightLimit;
    return limited > -kWeightLimit ? limited : static_cast<int16_t>(-kWeightLimit);
  }

  // All experts of a batch together weigh as much as those of one token.
  EXPERTFLOW_HD static int32_t Scaled(int32_t sum_of_weights, int32_t num_inputs, int32_t top_k) {
    const int32_t nominal = kNumSources * top_k;
    if (num_inputs <= nominal) return sum_of_weights;
    return static_cast<int32_t>(int64_t{sum_of_weights} * nominal / num_inputs);
  }

  EXPERTFLOW_HD static int32_t Logit(int32_t sum_of_weights, int32_t num_inputs, int32_t top_k,
                                     int16_t frequency) {
    return Scaled(sum_of_weights, num_inputs, top_k) + 2 * frequency;
  }

  // Where the sigmoid's table has the probability: looked up when it is learned from.
  EXPERTFLOW_HD static int16_t SigmoidIndex(int32_t logit) {
    const int32_t i = (logit >> kLogitStepBits) + kSigmoidHalf;
    constexpr int32_t kLast = 2 * kSigmoidHalf - 1;
    return static_cast<int16_t>(i < 0 ? 0 : i > kLast ? kLast : i);
  }

  // What of a score goes into the next.
  EXPERTFLOW_HD static int32_t Carried(int32_t score) { return (score * 5) >> 4; }

  EXPERTFLOW_HD static int32_t Score(int32_t logit, int32_t score) {
    return logit + Carried(score);
  }

  static constexpr int32_t kOneQ15 = (1 << 15) - 1;
};

// One step of one layer.
struct NeedStep {
  int64_t number = -1;                                // of the layer
  int32_t num_experts = 0;                            // routed
  int64_t source_steps[NeedRules::kNumSources] = {};  // which steps its logits came from
};

// Flat arrays in host or device memory.
struct NeedState {
  int32_t num_layers;
  int32_t num_experts;
  int32_t width;  // of a row: experts, rounded up to whole vectors
  int32_t top_k;
  int32_t window;
  int32_t ring;  // steps kept per layer

  int16_t* weights;        // [layer][source][routed][width]
  int16_t* frequency;      // [layer][width]
  int64_t* num_steps;      // [layer]
  NeedStep* steps;         // [layer][ring]
  int32_t* routed;         // [layer][ring][num_experts]
  int16_t* foreseen;       // [layer][ring][width] SigmoidIndex of the logits
  int32_t* scores;         // [layer][num_experts]
  const int16_t* sigmoid;  // [2 * kSigmoidHalf]

  // The layer that `source` of `layer` is about.
  EXPERTFLOW_HD int32_t SourceLayer(int32_t layer, int32_t source) const {
    const int32_t back = (source > 1 ? source - 1 : 0) % num_layers;
    return layer >= back ? layer - back : layer - back + num_layers;
  }

  EXPERTFLOW_HD int64_t StepIndex(int32_t layer, int64_t number) const {
    return int64_t{layer} * ring + (number & (ring - 1));
  }

  // The step of a layer, or nullptr: there is none yet, or its layer went on without this one.
  EXPERTFLOW_HD const NeedStep* Step(int32_t layer, int64_t number) const {
    if (number < 0) return nullptr;
    const NeedStep& step = steps[StepIndex(layer, number)];
    return step.number == number ? &step : nullptr;
  }

  EXPERTFLOW_HD int32_t* Routed(int32_t layer, int64_t number) const {
    return routed + StepIndex(layer, number) * num_experts;
  }

  EXPERTFLOW_HD int16_t* Foreseen(int32_t layer, int64_t number) const {
    return foreseen + StepIndex(layer, number) * width;
  }

  // Which row of the weights is about `routed` in `source` of `layer`.
  EXPERTFLOW_HD int32_t WeightRow(int32_t layer, int32_t source, int32_t routed_expert) const {
    return (layer * NeedRules::kNumSources + source) * num_experts + routed_expert;
  }

  EXPERTFLOW_HD int16_t* Weights(int32_t row) const { return weights + int64_t{row} * width; }
};

// What is known of an expert's score before its layer routes (core/block_need_ahead.h), if that is
// `layer`: the sum of weights of so many rows, and what comes to the score beside.
struct alignas(16) NeedAhead {
  int32_t sum = 0;
  int32_t num_inputs = 0;
  int32_t rest = 0;
  int32_t layer = -1;
};

// What the last plan observed of an expert, to be recorded behind it.
struct alignas(8) NeedObserved {
  int32_t score = 0;
  int32_t is_routed = 0;
};

// The end of the last plan.
struct alignas(16) NeedOutcome {
  // The plan found no slots to take: its layer and tick come again, and were observed already.
  Tick retried_tick = kNever;
  int32_t retried_layer = -1;
  int32_t observed_layer = -1;  // of what is not recorded yet, or -1
};

// The same with what a model on blocks of threads needs beside (core/block_need_step.h).
struct BlockNeedState {
  NeedState model;
  // The last step of every layer once more, where it is found before its number is known.
  int32_t* latest_count;   // [num_layers]
  int32_t* latest;         // [num_layers][num_experts]
  NeedAhead* ahead;        // [num_experts]
  NeedObserved* observed;  // [num_experts]
  NeedOutcome* outcome;
};

// Owns the arrays in host memory, as they are before the first step.
class NeedArrays {
 public:
  // For a cache of `num_slots` for all layers. All sizes must be positive.
  NeedArrays(int32_t num_layers, int32_t num_experts, int32_t top_k, int32_t num_slots);

  NeedArrays(const NeedArrays&) = delete;
  NeedArrays& operator=(const NeedArrays&) = delete;

  const NeedState& state() const { return state_; }

  // Calls visit(pointer to the array in `state`, its bytes) for every array.
  template <class Visit>
  static void ForEach(NeedState& state, Visit&& visit) {
    const auto layers = static_cast<size_t>(state.num_layers);
    const auto experts = static_cast<size_t>(state.num_experts);
    const auto width = static_cast<size_t>(state.width);
    const size_t rings = layers * static_cast<size_t>(state.ring);
    const auto each = [&visit](auto*& array, size_t count) { visit(array, count * sizeof *array); };
    each(state.weights, layers * NeedRules::kNumSources * experts * width);
    each(state.frequency, layers * width);
    each(state.num_steps, layers);
    each(state.steps, rings);
    each(state.routed, rings * experts);
    each(state.foreseen, rings * width);
    each(state.scores, layers * experts);
    each(state.sigmoid, size_t{2 * NeedRules::kSigmoidHalf});
  }

 private:
  std::vector<int16_t> weights_;
  std::vector<int16_t> frequency_;
  std::vector<int64_t> num_steps_;
  std::vector<NeedStep> steps_;
  std::vector<int32_t> routed_;
  std::vector<int16_t> foreseen_;
  std::vector<int32_t> scores_;
  std::array<int16_t, size_t{2 * NeedRules::kSigmoidHalf}> sigmoid_;
  NeedState state_;
};

}  // namespace expertflow
