#include "core/predictor/score_model.h"

#include "core/predictor/feature_scales.h"
#include "core/predictor/vector_math.h"

namespace expertflow {

void ScoreModel::Score(std::span<const float> x, std::span<const float> base,
                       std::span<float> scores) const {
  MatrixVector(weights_.data(), base.size(), x.size(), x.data(), x.size(), scores.data());
  for (size_t e = 0; e < base.size(); ++e) scores[e] += scalars_.gain * base[e];
}

void ScoreModel::Learn(std::span<const float> x, std::span<const float> base,
                       std::span<const float> targets, std::span<float> scores) {
  float power = 0.0f;
  MatrixVector(x.data(), 1, x.size(), x.data(), x.size(), &power);
  const float step = ScoreScalars::WeightStep(scalars_.Schedule(), power);
  float gain_gradient = 0.0f;
  for (size_t e = 0; e < scores.size(); ++e) {
    const float error = Logistic(scores[e]) - targets[e];
    gain_gradient += error * base[e];
    scores[e] = -step * error;
  }
  AddOuterProduct(weights_.data(), scores.size(), x.size(), scores.data(), x.data(), x.size());
  scalars_.LearnGain(gain_gradient);
}

}  // namespace expertflow
