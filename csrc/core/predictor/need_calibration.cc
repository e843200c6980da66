#include "core/predictor/need_calibration.h"

#include <algorithm>
#include <cmath>

namespace expertflow {
namespace {

constexpr float kMinRate = 0.002f;  // forgets within about 500 tokens
constexpr float kPriorTokens = 20.0f;
constexpr float kMaxScore = 12.0f;
constexpr float kMinSlope = 0.1f;  // keeps the map rising
constexpr float kMaxSlope = 10.0f;

}  // namespace

float NeedCalibration::Probability(float score) const {
  const float clamped = std::clamp(score, -kMaxScore, kMaxScore);
  return 1.0f / (1.0f + std::exp(-(slope * clamped + offset)));
}

void CalibrationStep::Add(const NeedCalibration& calibration, float score, bool was_routed) {
  const float x = std::clamp(score, -kMaxScore, kMaxScore);
  const float p = calibration.Probability(score);
  const float error = p - (was_routed ? 1.0f : 0.0f);
  const float weight = p * (1.0f - p);
  gradient_slope_ += error * x;
  gradient_offset_ += error;
  curvature_slope_ += weight * x * x;
  curvature_both_ += weight * x;
  curvature_offset_ += weight;
}

void CalibrationStep::Apply(NeedCalibration& c) const {
  c.num_tokens += 1.0f;
  const float mean_rate = std::max(1.0f / c.num_tokens, kMinRate);
  c.curvature_slope += mean_rate * (curvature_slope_ - c.curvature_slope);
  c.curvature_both += mean_rate * (curvature_both_ - c.curvature_both);
  c.curvature_offset += mean_rate * (curvature_offset_ - c.curvature_offset);
  const float rate = std::max(1.0f / (c.num_tokens + kPriorTokens), kMinRate);
  const float a = c.curvature_slope * 1.01f + 1e-4f, d = c.curvature_offset * 1.01f + 1e-4f;
  const float b = c.curvature_both;
  const float determinant = a * d - b * b;
  c.slope -= rate * (d * gradient_slope_ - b * gradient_offset_) / determinant;
  c.offset -= rate * (a * gradient_offset_ - b * gradient_slope_) / determinant;
  c.slope = std::clamp(c.slope, kMinSlope, kMaxSlope);
  c.offset = std::clamp(c.offset, -kMaxScore, kMaxScore);
}

}  // namespace expertflow
