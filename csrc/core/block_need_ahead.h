#pragma once

#include <cstdint>

#include "core/block_need_step.h"
#include "core/eviction/need_state.h"
#include "core/host_device.h"

namespace expertflow {

// Sums, for the plan of the next layer, the weights of all sources that are known before that layer
// routes: behind this layer's plan, whose rows do not wait for it. `sums` and `rests` [num_experts]
// and `num_inputs` lie in shared memory. Called by all threads of a block, behind a barrier.
template <class Block>
EXPERTFLOW_DEVICE void SumNeedsAhead(Block& block, const BlockNeedState& state, int32_t layer,
                                     int32_t* sums, int32_t* rests, int32_t& num_inputs) {
  const NeedState& model = state.model;
  const int32_t next = layer + 1 < model.num_layers ? layer + 1 : 0;
  const int32_t num_threads = block.num_threads();
  const int32_t num_experts = model.num_experts;
  EXPERTFLOW_NO_UNROLL
  for (int32_t e = block.thread(); e < num_experts; e += num_threads) sums[e] = 0;
  if (block.thread() == 0) num_inputs = 0;
  block.Sync();
  // As many threads for each expert as there are, in turns with the sources.
  const int32_t stride = num_threads < num_experts ? num_threads : num_experts;
  const int32_t num_groups = num_threads / stride;
  const int32_t group = block.thread() / stride;
  EXPERTFLOW_NO_UNROLL
  for (int32_t e = block.thread() % stride; e < num_experts && group < num_groups; e += stride) {
    const int32_t rest = group == 0 ? RestOfScore(model, next, e) : 0;
    WeightSum sum;
    EXPERTFLOW_NO_UNROLL
    for (int32_t s = group; s < NeedRules::kNumSources; s += num_groups) {
      if (!IsThisStep(model, next, s)) AddLatestWeights(sum, state, next, s, e);
    }
    block.Add(sums[e], sum.sum);
    if (e == 0) block.Add(num_inputs, sum.num_inputs);
    if (group == 0) rests[e] = rest;
  }
  block.Sync();
  EXPERTFLOW_NO_UNROLL
  for (int32_t e = block.thread(); e < num_experts; e += num_threads) {
    state.ahead[e] = {sums[e], num_inputs, rests[e], next};
  }
}

}  // namespace expertflow
