#pragma once

#include <cmath>

#include "core/host_device.h"

namespace expertflow {

// Platt scaling, learned online: the probability that an expert is routed is
// sigmoid(slope * score + offset). Newton steps with a running mean of the Hessian, so there is no
// step size to tune. Plain floats, because arrays of these are saved as they are.
struct NeedCalibration {
  static constexpr float kMaxScore = 12.0f;

  float slope = 1.0f;
  float offset = 0.0f;
  float curvature_slope = 0.0f;  // the mean Hessian of the log loss: [slope, both; both, offset]
  float curvature_both = 0.0f;
  float curvature_offset = 0.0f;
  float num_tokens = 0.0f;

  EXPERTFLOW_HD float Probability(float score) const {
    const float clamped = std::fmin(std::fmax(score, -kMaxScore), kMaxScore);
    return 1.0f / (1.0f + std::exp(-(slope * clamped + offset)));
  }
};

// Sums over the experts of one token, from which the calibration learns.
struct CalibrationStep {
  float gradient_slope = 0.0f, gradient_offset = 0.0f;
  float curvature_slope = 0.0f, curvature_both = 0.0f, curvature_offset = 0.0f;

  EXPERTFLOW_HD void Add(const NeedCalibration& calibration, float score, bool was_routed) {
    const float x =
        std::fmin(std::fmax(score, -NeedCalibration::kMaxScore), NeedCalibration::kMaxScore);
    const float p = calibration.Probability(score);
    const float error = p - (was_routed ? 1.0f : 0.0f);
    const float weight = p * (1.0f - p);
    gradient_slope += error * x;
    gradient_offset += error;
    curvature_slope += weight * x * x;
    curvature_both += weight * x;
    curvature_offset += weight;
  }

  EXPERTFLOW_HD void Apply(NeedCalibration& c) const {
    constexpr float kMinRate = 0.002f;  // forgets within about 500 tokens
    constexpr float kPriorTokens = 20.0f;
    constexpr float kMinSlope = 0.1f;  // keeps the map rising
    constexpr float kMaxSlope = 10.0f;
    constexpr float kMaxOffset = 12.0f;
    c.num_tokens += 1.0f;
    const float mean_rate = std::fmax(1.0f / c.num_tokens, kMinRate);
    c.curvature_slope += mean_rate * (curvature_slope - c.curvature_slope);
    c.curvature_both += mean_rate * (curvature_both - c.curvature_both);
    c.curvature_offset += mean_rate * (curvature_offset - c.curvature_offset);
    const float rate = std::fmax(1.0f / (c.num_tokens + kPriorTokens), kMinRate);
    const float a = c.curvature_slope * 1.01f + 1e-4f, d = c.curvature_offset * 1.01f + 1e-4f;
    const float b = c.curvature_both;
    const float determinant = a * d - b * b;
    c.slope -= rate * (d * gradient_slope - b * gradient_offset) / determinant;
    c.offset -= rate * (a * gradient_offset - b * gradient_slope) / determinant;
    c.slope = std::fmin(std::fmax(c.slope, kMinSlope), kMaxSlope);
    c.offset = std::fmin(std::fmax(c.offset, -kMaxOffset), kMaxOffset);
  }
};

}  // namespace expertflow
