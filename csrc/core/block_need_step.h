#pragma once

#include <cstddef>
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

// Adds an expert's weights in the rows of a source, of which `weights` is the first, that are about
// `experts` [count], each where is_row(its place, the expert) says so. Some are read at once,
// whether they are rows or not, since it takes longer to find that out than to read them.
template <int32_t kAtOnce, class IsRow>
EXPERTFLOW_DEVICE void AddWeights(WeightSum& to, const int16_t* weights, int32_t width,
                                  int32_t expert, const int32_t* experts, int32_t count,
                                  const IsRow& is_row) {
  EXPERTFLOW_NO_UNROLL
  for (int32_t first = 0; first < count; first += kAtOnce) {
    int32_t routed[size_t{kAtOnce}], found[size_t{kAtOnce}];
    bool counts[size_t{kAtOnce}];
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; ++k) {
      routed[k] = experts[first + k < count ? first + k : count - 1];
    }
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; ++k) found[k] = weights[routed[k] * width + expert];
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; ++k) counts[k] = is_row(first + k, routed[k]);
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; ++k) {
      const bool adds = (first + k < count) & counts[k];
      to.sum += adds ? found[k] : 0;
      to.num_inputs += adds ? 1 : 0;
    }
  }
}

// The same of what a source routed last.
template <int32_t kAtOnce>
EXPERTFLOW_DEVICE void AddLatestWeights(WeightSum& to, const BlockNeedState& state, int32_t layer,
                                        int32_t source, int32_t expert) {
  const NeedState& model = state.model;
  const int32_t source_layer = model.SourceLayer(layer, source);
  AddWeights<kAtOnce>(to, model.Weights(model.WeightRow(layer, source, 0)), model.width, expert,
                      state.latest + int64_t{source_layer} * model.num_experts,
                      state.latest_count[source_layer], [](int32_t, int32_t) { return true; });
}

// What comes to an expert's next score beside the weights, if it is not used.
EXPERTFLOW_DEVICE inline int32_t RestOfScore(const NeedState& model, int32_t layer,
                                             int32_t expert) {
  const int16_t frequency = model.frequency[int64_t{layer} * model.width + expert];
  const int32_t score = model.scores[int64_t{layer} * model.num_experts + expert];
  return 2 * NeedRules::Decayed(frequency) + NeedRules::Carried(score);
}

}  // namespace expertflow
