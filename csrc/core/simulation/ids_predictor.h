#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/simulation/routing_memory.h"
#include "core/simulation/step_predictor.h"

namespace expertflow {

// Predicts from expert ids alone, learned online: one logistic regression per layer and distance,
//
//   logit[e] = sum over features f: gain[f] * feature[f][e]
//            + sum over the last kNumSources steps s, experts r routed there: weight[s][r][e]
//   features   log-odds of how often the target layer uses e (mean over 200 tokens), a constant,
//              and what past tokens like this one voted (RoutingMemory), softly and sharply
//
// trained on whether the target used e. docs/prediction.md has what it reaches.
class IdsPredictor : public StepPredictor {
 public:
  // Keeps a view of the trace.
  IdsPredictor(const TraceView& trace, int32_t max_distance);
  void Predict(int64_t step, int32_t max_distance, std::vector<Prediction>& out) override;
  void Learn(int64_t step) override;

 private:
  static constexpr int64_t kNumSources = 4;
  static constexpr size_t kNumFeatures = 4;

  // Of one layer and distance.
  struct Gains {
    std::array<float, kNumFeatures> gain;
    std::array<float, kNumFeatures> power;  // running mean of its squared gradient
  };
  // What was foreseen at a step for one distance.
  struct Foreseen {
    std::vector<float> features;  // [kNumFeatures, num_experts]
    std::vector<float> need;      // [num_experts]
  };

  size_t PairOf(int64_t step, int32_t distance) const;
  Foreseen& ForeseenAt(int64_t step, int32_t distance);
  // Calls visit(row [num_experts]) for the weights of what was routed up to `step`.
  template <class Visit>
  void ForEachRow(int64_t step, int32_t distance, Visit&& visit);
  void LearnUse(int64_t step);
  void LearnFrom(int64_t step, int32_t distance);
  void LearnGains(int64_t step, int32_t distance);
  void Score(int64_t step, int32_t distance);

  TraceView trace_;
  int32_t max_distance_;
  size_t num_experts_;
  RoutingMemory memory_;
  std::vector<float> frequency_;    // [num_layers, num_experts]
  std::vector<float> weights_;      // [num_layers, max_distance, kNumSources, experts, experts]
  std::vector<Gains> gains_;        // [num_layers, max_distance]
  std::vector<Foreseen> foreseen_;  // [max_distance + 1 steps, max_distance]
  std::vector<float> used_;         // [num_experts] by the step just learned: 0 or 1
  std::vector<float> error_;        // [num_experts]
  std::vector<int32_t> ranked_;     // [num_experts]
};

}  // namespace expertflow
