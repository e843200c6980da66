#pragma once

#include <cmath>
#include <cstddef>
#include <span>

#include "core/host_device.h"

namespace expertflow {

// The floats of a score model that are not weights; saved as they are. The constants are measured
// on docs-moe-12x32 (docs/prediction.md).
struct ScoreScalars {
  float gain;               // of the pre-gate
  float gain_power = 0.0f;  // running mean square of the gain's gradient
  float num_tokens = 0.0f;  // learned from

  // How large the steps still are. The floor keeps the model able to follow a change of topic for
  // good.
  EXPERTFLOW_HD float Schedule() const {
    constexpr float kTokens = 10000.0f;
    constexpr float kFloor = 0.4f;
    return std::fmax(kFloor, 1.0f / std::sqrt(1.0f + num_tokens / kTokens));
  }

  // What the weights move by, times the error and x, for features of squared length `power`.
  EXPERTFLOW_HD static float WeightStep(float schedule, float power) {
    constexpr float kStep = 2.0f;
    return kStep * schedule / (power + 1e-6f);
  }

  // Takes the gradient of one more token.
  EXPERTFLOW_HD void LearnGain(float gradient) {
    constexpr float kGainStep = 0.02f;
    constexpr float kPowerRate = 0.001f;
    const float schedule = Schedule();
    const float rate = std::fmax(1.0f / (num_tokens + 1.0f), kPowerRate);
    gain_power += rate * (gradient * gradient - gain_power);
    gain -= kGainStep * schedule * gradient / std::sqrt(gain_power + 1e-12f);
    num_tokens += 1.0f;
  }
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
  std::span<float> weights_;
  ScoreScalars& scalars_;
};

}  // namespace expertflow
