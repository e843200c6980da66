#pragma once

#include <cmath>

#include "core/host_device.h"

// What the predictor on the host and its kernels have in common: constants, and what is learned
// from one token. Measured on docs-moe-12x32, docs/prediction.md.

namespace expertflow {

// How much the features count beside h.
inline constexpr float kPreviousScale = 0.5f;
inline constexpr float kTokenScale = 0.375f;
inline constexpr float kBiasFeature = 0.1f;

EXPERTFLOW_HD inline float Logistic(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// How far a layer's deviation moves towards that of its latest token, the `num_tokens`-th.
EXPERTFLOW_HD inline float DeviationRate(float num_tokens) {
  constexpr float kMinRate = 0.01f;
  return std::fmax(kMinRate, 1.0f / num_tokens);
}

// How far the mean of a token id moves at its `count`-th occurrence. From a mean of 0 this gives
// sum / (count + 1): few occurrences count for little. Later it follows the last 20 or so.
EXPERTFLOW_HD inline float TokenRate(float count) {
  constexpr float kMinRate = 0.05f;
  return std::fmax(kMinRate, 1.0f / (count + 1.0f));
}

}  // namespace expertflow
