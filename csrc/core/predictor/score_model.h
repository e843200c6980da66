#pragma once

#include <cstddef>
#include <span>

namespace expertflow {

// The floats of a score model that are not weights; saved as they are.
struct ScoreScalars {
  float gain;               // of the pre-gate
  float gain_power = 0.0f;  // running mean square of the gain's gradient
  float num_tokens = 0.0f;  // learned from
};

// The scores that one layer gives to the experts of one later layer:
//
//   score = gain * base + weights x       logit of the chance to be routed, before calibration
//
// `base` [experts] is the margin of the pre-gate in standard deviations, x the features. Learned
// online by normalised stochastic gradient descent on the cross entropy to *soft* targets: how
// clearly an expert was routed says more than whether it was. A view of memory owned by another.
class ScoreModel {
 public:
  // What the gain starts with: a fresh model is the pre-gate. The soft targets use the same scale.
  static constexpr float kFirstGain = 1.0f / 0.35f;

  // `weights` is [experts, x.size()].
  ScoreModel(std::span<float> weights, ScoreScalars& scalars)
      : weights_(weights), scalars_(scalars) {}

  void Score(std::span<const float> x, std::span<const float> base, std::span<float> scores) const;

  // `scores` are those of the same x, base and weights; they are overwritten. `targets` [experts]
  // lie in 0..1.
  void Learn(std::span<const float> x, std::span<const float> base, std::span<const float> targets,
             std::span<float> scores);

 private:
  void LearnGain(float gradient, float schedule);

  std::span<float> weights_;
  ScoreScalars& scalars_;
};

}  // namespace expertflow
