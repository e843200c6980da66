#pragma once

#include <cstdint>

#include "core/eviction/need_state.h"
#include "core/host_device.h"

// What the parts of the need model on blocks of threads share: core/block_need_scores.h,
// core/block_need_learner.h and core/block_need_ahead.h. They are made of the functions of
// eviction/need_state.h, as the model on the host is, so all agree bit by bit. `Block` is what
// core/block_planner.h says.

namespace expertflow {

// Whether a source of `layer` is the step that is being observed: its rows are what is routed now.
EXPERTFLOW_HD inline bool IsThisStep(const NeedState& model, int32_t layer, int32_t source) {
  return source != 1 && model.SourceLayer(layer, source) == layer;
}

struct WeightSum {
  int32_t sum = 0;
  int32_t num_inputs = 0;  // rows it is of
};

// Adds an expert's weights in the rows of `source` that are about what it routed last. Some are
// read at once.
EXPERTFLOW_DEVICE inline void AddLatestWeights(WeightSum& to, const BlockNeedState& state,
                                               int32_t layer, int32_t source, int32_t expert) {
  constexpr int32_t kAtOnce = 8;
  const NeedState& model = state.model;
  const int32_t source_layer = model.SourceLayer(layer, source);
  const int16_t* weights = model.Weights(model.WeightRow(layer, source, 0));
  const int32_t* latest = state.latest + int64_t{source_layer} * model.num_experts;
  const int32_t count = state.latest_count[source_layer];
  EXPERTFLOW_NO_UNROLL
  for (int32_t first = 0; first < count; first += kAtOnce) {
    int32_t routed[kAtOnce], found[kAtOnce];
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; ++k) {
      routed[k] = latest[first + k < count ? first + k : count - 1];
    }
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; ++k) found[k] = weights[routed[k] * model.width + expert];
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; ++k) to.sum += first + k < count ? found[k] : 0;
  }
  to.num_inputs += count;
}

// What comes to an expert's next score beside the weights, if it is not used.
EXPERTFLOW_DEVICE inline int32_t RestOfScore(const NeedState& model, int32_t layer,
                                             int32_t expert) {
  const int16_t frequency = model.frequency[int64_t{layer} * model.width + expert];
  const int32_t score = model.scores[int64_t{layer} * model.num_experts + expert];
  return 2 * NeedRules::Decayed(frequency) + NeedRules::Carried(score);
}

}  // namespace expertflow
