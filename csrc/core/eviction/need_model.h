#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

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
class NeedModel {
 public:
  static constexpr int32_t kLayersBack = 3;
  static constexpr int32_t kNumSources = 2 + kLayersBack;
  static constexpr int32_t kFractionBits = 10;  // of weights, frequencies, logits and scores
  static constexpr int32_t kMaxWindow = 32;

  // For a cache of `num_slots` for all layers. All sizes must be positive.
  NeedModel(int32_t num_layers, int32_t num_experts, int32_t top_k, int32_t num_slots);

  NeedModel(const NeedModel&) = delete;
  NeedModel& operator=(const NeedModel&) = delete;

  // A decode step routed `layer` to `experts`, each once: learns from the step `window` steps ago,
  // whose needs are known now, and returns the new scores [num_experts] of the layer's experts: the
  // larger, the sooner it will be needed, and comparable across layers. Allocates nothing.
  const int32_t* Observe(int32_t layer, std::span<const int32_t> experts);

  // [num_experts] as `Observe` last returned them; at first zeros.
  const int32_t* scores(int32_t layer) const {
    return scores_.data() + static_cast<ptrdiff_t>(layer) * num_experts_;
  }

  int32_t window() const { return window_; }

 private:
  // One step of one layer.
  struct Step {
    int64_t number = -1;                            // of the layer
    int32_t num_experts = 0;                        // routed
    std::array<int64_t, kNumSources> source_steps;  // which steps its logits came from
  };

  static constexpr int32_t kLogitStepBits = 5;  // the sigmoid is tabulated at 1/32
  static constexpr int32_t kSigmoidHalf = 256;  // and up to +-8

  int32_t SourceLayer(int32_t layer, int32_t source) const;
  size_t StepIndex(int32_t layer, int64_t number) const;
  std::span<const int32_t> Routed(int32_t layer, int64_t number) const;
  int16_t* WeightRow(int32_t layer, int32_t source, int32_t routed);
  void Record(int32_t layer, int64_t number, std::span<const int32_t> experts);
  void UpdateFrequency(int32_t layer, std::span<const int32_t> experts);
  void Learn(int32_t layer, int64_t number);
  void Score(int32_t layer, int64_t number);
  // The weight rows that make up the logits of a step.
  std::span<int16_t* const> InputRows(int32_t layer, int64_t number);
  int32_t NominalInputs() const;

  int32_t num_layers_;
  int32_t num_experts_;
  int32_t width_;  // of a row: experts, rounded up to whole vectors
  int32_t top_k_;
  int32_t window_;
  int32_t ring_;  // steps kept per layer

  std::vector<int16_t> weights_;        // [layer][source][routed][width]
  std::vector<int16_t> frequency_;      // [layer][width]
  std::vector<int64_t> num_steps_;      // [layer]
  std::vector<Step> steps_;             // [layer][ring]
  std::vector<int32_t> routed_;         // [layer][ring][num_experts]
  std::vector<int16_t> probabilities_;  // [layer][ring][width] 15 fraction bits
  std::vector<int32_t> scores_;         // [layer][num_experts]
  std::vector<int32_t> logits_;         // [width] of the layer being scored
  std::vector<int32_t> labels_;         // [width] 15 fraction bits
  std::vector<int16_t> gradient_;       // [width]
  std::vector<int16_t> sums_;           // [width] of a few rows
  std::vector<int16_t*> input_rows_;
  std::array<int16_t, size_t{2 * kSigmoidHalf}> sigmoid_;
};

}  // namespace expertflow
