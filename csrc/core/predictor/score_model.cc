#include "core/predictor/score_model.h"

#include <algorithm>
#include <cmath>

#include "core/predictor/vector_math.h"

namespace expertflow {
namespace {

// Measured on docs-moe-12x32 (docs/prediction.md). The floor keeps the model able to follow a
// change of topic for good.
constexpr float kStep = 2.0f;
constexpr float kScheduleTokens = 10000.0f;
constexpr float kScheduleFloor = 0.4f;
constexpr float kGainStep = 0.02f;
constexpr float kGainPowerRate = 0.001f;

}  // namespace

void ScoreModel::Score(std::span<const float> x, std::span<const float> base,
                       std::span<float> scores) const {
  MatrixVector(weights_.data(), base.size(), x.size(), x.data(), x.size(), scores.data());
  for (size_t e = 0; e < base.size(); ++e) scores[e] += scalars_.gain * base[e];
}

void ScoreModel::Learn(std::span<const float> x, std::span<const float> base,
                       std::span<const float> targets, std::span<float> scores) {
  const float schedule =
      std::max(kScheduleFloor, 1.0f / std::sqrt(1.0f + scalars_.num_tokens / kScheduleTokens));
  float power = 0.0f;
  MatrixVector(x.data(), 1, x.size(), x.data(), x.size(), &power);
  const float step = kStep * schedule / (power + 1e-6f);
  float gain_gradient = 0.0f;
  for (size_t e = 0; e < scores.size(); ++e) {
    const float error = 1.0f / (1.0f + std::exp(-scores[e])) - targets[e];
    gain_gradient += error * base[e];
    scores[e] = -step * error;
  }
  AddOuterProduct(weights_.data(), scores.size(), x.size(), scores.data(), x.data(), x.size());
  LearnGain(gain_gradient, schedule);
  scalars_.num_tokens += 1.0f;
}

void ScoreModel::LearnGain(float gradient, float schedule) {
  const float rate = std::max(1.0f / (scalars_.num_tokens + 1.0f), kGainPowerRate);
  scalars_.gain_power += rate * (gradient * gradient - scalars_.gain_power);
  scalars_.gain -= kGainStep * schedule * gradient / std::sqrt(scalars_.gain_power + 1e-12f);
}

}  // namespace expertflow
