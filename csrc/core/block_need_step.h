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

// Adds an expert's weights in the rows of `source` that are about `experts`, from `begin` to `end`
// and each where is_row(its place, the expert) says so. Some are read at once, whether they are
// rows or not, since it takes longer to find that out than to read them.
template <class IsRow>
EXPERTFLOW_DEVICE void AddWeights(WeightSum& to, const NeedState& model, int32_t layer,
                                  int32_t source, int32_t expert, const int32_t* experts,
                                  int32_t begin, int32_t end, const IsRow& is_row) {
  constexpr int32_t kAtOnce = 8;
  const int16_t* weights = model.Weights(model.WeightRow(layer, source, 0)) + expert;
  EXPERTFLOW_NO_UNROLL
  for (int32_t first = begin; first < end; first += kAtOnce) {
    int32_t routed[kAtOnce], found[kAtOnce];
    bool counts[kAtOnce];
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; ++k) {
      routed[k] = experts[first + k < end ? first + k : end - 1];
    }
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; ++k) found[k] = weights[routed[k] * model.width];
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; ++k) counts[k] = is_row(first + k, routed[k]);
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; ++k) {
      const bool adds = (first + k < end) & counts[k];
      to.sum += adds ? found[k] : 0;
      to.num_inputs += adds ? 1 : 0;
    }
  }
}

// The same of what a source routed last.
EXPERTFLOW_DEVICE inline void AddLatestWeights(WeightSum& to, const BlockNeedState& state,
                                               int32_t layer, int32_t source, int32_t expert) {
  const int32_t source_layer = state.model.SourceLayer(layer, source);
  AddWeights(to, state.model, layer, source, expert,
             state.latest + int64_t{source_layer} * state.model.num_experts, 0,
             state.latest_count[source_layer], [](int32_t, int32_t) { return true; });
}

}  // namespace expertflow
