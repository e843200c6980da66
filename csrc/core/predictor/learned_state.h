#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/host_device.h"
#include "core/predictor/need_calibration.h"
#include "core/predictor/routing_rule.h"
#include "core/predictor/score_model.h"

namespace expertflow {

struct PredictorConfig {
  int32_t num_layers = 0;  // MoE layers
  int32_t hidden = 0;
  int32_t max_distance = 0;
  int32_t num_token_buckets = 0;  // token ids are taken modulo this; 0: tokens are not looked at
  RoutingRule rule;

  // Throws std::invalid_argument.
  void Check() const;
};

// What stands for the layer before the first one: the embedding of a token, which is known as soon
// as its id is.
inline constexpr int32_t kTokenStart = -1;

// The embedding is source 0, then come the layers.
EXPERTFLOW_HD constexpr size_t SourceOf(int32_t layer) {
  return static_cast<size_t>(layer - kTokenStart);
}

// Everything a predictor has learned, in flat arrays that are saved, and copied to a device, as
// they are. A *pair* is a source, that is the embedding or a layer, and a distance whose target
// layer exists: those of the embedding come first.
struct LearnedState {
  explicit LearnedState(const PredictorConfig& config);

  size_t Pair(int32_t layer, size_t distance) const {
    return first_pair[SourceOf(layer)] + distance - 1;
  }
  std::span<float> Weights(size_t pair) {
    return {weights.data() + pair * num_experts * num_features, num_experts * num_features};
  }
  // The mean target of a bucket's tokens at `layer`, shrunk towards 0 while there are few.
  std::span<float> TokenMean(size_t layer, size_t bucket) {
    return {token_means.data() + (layer * num_buckets + bucket) * num_experts, num_experts};
  }

  size_t num_experts, num_buckets;
  size_t num_features;                // hidden + hidden + experts + 1, rounded up to 16 floats
  std::vector<size_t> first_pair;     // by source, and one more: the number of pairs
  std::vector<float> weights;         // [pairs, experts, features]
  std::vector<ScoreScalars> scalars;  // [pairs]
  std::vector<NeedCalibration> calibrations;  // [pairs]
  std::vector<float> token_means;             // [layers, buckets, experts]
  std::vector<float> token_counts;            // [layers, buckets]
  std::vector<float> deviations;              // [layers] of the selection scores; 0: none seen yet
  std::vector<float> num_tokens;              // [layers] behind `deviations`
};

}  // namespace expertflow
