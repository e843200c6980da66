#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/eviction/need_state.h"

namespace expertflow {

// Scores every expert by how soon its layer will need it again, learned online from the routed ids.
//
// Logistic regression on which experts were routed of late, one weight per pair of experts:
//   logit[e] = 2 f[e] + sum over sources s, over routed r in s: weight[layer][s][r][e]
//   sources    the layer's experts now and at the last token; those of kLayersBack layers before it
//   f[e]       share of the layer's tokens that used e, averaged over 8 tokens
// The label is the need, 1 if the next token uses e, falling linearly to 0 at `window` tokens: what
// Belady's rule orders by, cut where no cache of that size could keep the expert. Plain gradient
// steps of a constant rate did better than decaying ones, because topics change. The score averages
// the logits of the last tokens.
//
// docs/eviction.md has what this reaches, and what else was tried.
//
// Integers only, so the same ids give the same scores everywhere, whatever the compiler contracts
// or reorders. Memory: (2 + kLayersBack) * num_layers * num_experts^2 weights of two bytes.
class NeedModel : public NeedRules {
 public:
  // For a cache of `num_slots` for all layers. All sizes must be positive.
  NeedModel(int32_t num_layers, int32_t num_experts, int32_t top_k, int32_t num_slots);

  NeedModel(const NeedModel&) = delete;
  NeedModel& operator=(const NeedModel&) = delete;

  // A decode step routed `layer` to `experts`, each once: returns the new scores [num_experts] of
  // the layer's experts, the larger, the sooner it will be needed, and comparable across layers.
  // Then learns from the step `window` steps ago, whose needs are known now: last, so that the
  // planner kernel may leave it to a kernel behind it. Allocates nothing.
  const int32_t* Observe(int32_t layer, std::span<const int32_t> experts);

  // [num_experts] as `Observe` last returned them; at first zeros.
  const int32_t* scores(int32_t layer) const {
    return state_.scores + static_cast<ptrdiff_t>(layer) * state_.num_experts;
  }

  int32_t window() const { return state_.window; }

 private:
  std::span<const int32_t> Routed(int32_t layer, int64_t number) const;
  void Record(int32_t layer, int64_t number, std::span<const int32_t> experts);
  void UpdateFrequency(int32_t layer, std::span<const int32_t> experts);
  void Learn(int32_t layer, int64_t number);
  void ScoreAll(int32_t layer, int64_t number);
  // The weight rows that make up the logits of a step.
  std::span<int16_t* const> InputRows(int32_t layer, int64_t number);

  NeedArrays arrays_;
  const NeedState& state_;
  std::vector<int32_t> logits_;    // [width] of the layer being scored
  std::vector<int32_t> labels_;    // [width] 15 fraction bits
  std::vector<int16_t> gradient_;  // [width]
  std::vector<int16_t> sums_;      // [width] of a few rows
  std::vector<int16_t*> input_rows_;
};

}  // namespace expertflow
