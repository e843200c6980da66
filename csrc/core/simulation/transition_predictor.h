#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/simulation/step_predictor.h"

namespace expertflow {

// Predicts from expert ids alone, learned online: how often the experts of a layer are followed by
// each expert `distance` layers later, also over the end of a token. An expert's score is the mean
// over the layer's experts; its need is how often such a score came true.
class TransitionPredictor : public StepPredictor {
 public:
  TransitionPredictor(const TraceView& trace, int32_t max_distance);
  void Predict(int64_t step, int32_t max_distance, std::vector<Prediction>& out) override;
  void Learn(int64_t step) override;

 private:
  static constexpr int32_t kNumBuckets = 64;
  // How often a score of this size came true.
  struct Bucket {
    uint32_t num_needed = 0;
    uint32_t num_scored = 0;
  };

  // P(expert at layer + distance | each expert at layer), in 1/65536: [num_experts].
  uint16_t* Row(int32_t layer, int32_t distance, uint16_t expert);
  // What was scored at `step` for `distance` steps later: [num_experts].
  uint16_t* Scores(int64_t step, int32_t distance);
  void LearnTransitions(int64_t step, int32_t distance);
  void LearnCalibration(int64_t step, int32_t distance);
  void Score(int64_t step, int32_t distance);
  float NeedOf(int32_t distance, uint16_t score) const;

  TraceView trace_;
  int32_t max_distance_;
  std::vector<uint16_t> transitions_;  // [num_layers, max_distance, num_experts, num_experts]
  std::vector<uint16_t> scores_;       // [max_distance + 1 steps, max_distance, num_experts]
  std::vector<std::array<Bucket, kNumBuckets>> buckets_;  // [max_distance]
  std::vector<uint8_t> needed_;                           // [num_experts] by the step just learned
  std::vector<uint32_t> ranked_;                          // [num_experts]
};

}  // namespace expertflow
