#pragma once

#include <cstdint>

#include "core/block_need_ahead.h"
#include "core/eviction/need_state.h"
#include "core/eviction/predicted_need.h"
#include "core/four.h"
#include "core/host_device.h"

// The second half of what NeedModel::Observe (eviction/need_model.h) does, in a kernel of its own
// behind the plan, whose rows do not wait for it: records what the plan observed, and learns; and
// what makes the next plan short. The first half is core/block_need_scores.h.

namespace expertflow {

// Lies in the shared memory of the block.
struct BlockLearnerShared {
  int32_t num_inputs;  // rows that are learned from
  int32_t num_routed;
};

// Words of shared memory that learning needs beside.
EXPERTFLOW_HD inline int32_t NumLearnerWords(int32_t num_experts, int32_t width) {
  return NeedRules::kNumSources * num_experts + width;
}

template <class Block>
class BlockNeedLearner {
 public:
  // `shared_words` [NumLearnerWords(num_experts, width)] lie in shared memory, too. `expert_key` is
  // the slot table's.
  EXPERTFLOW_DEVICE BlockNeedLearner(Block& block, BlockLearnerShared& shared,
                                     int32_t* shared_words, const BlockNeedState& state,
                                     int64_t* expert_key, int32_t layer)
      : block_(block),
        shared_(shared),
        state_(state),
        model_(state.model),
        inputs_(shared_words),
        first_use_(shared_words + NeedRules::kNumSources * state.model.num_experts),
        expert_key_(expert_key),
        layer_(layer),
        thread_(block.thread()),
        lane_(block.thread() % Block::kWarpSize),
        warp_(block.thread() / Block::kWarpSize),
        num_warps_(block.num_threads() / Block::kWarpSize) {}

  // Records, once, what the layer's last plan observed, learns from the step whose needs are known
  // with it, and sums for the next layer.
  EXPERTFLOW_DEVICE void Learn() {
    EXPERTFLOW_NO_UNROLL
    for (int32_t e = thread_; e < model_.width; e += block_.num_threads()) {
      first_use_[e] = model_.window + 1;
    }
    if (thread_ == 0) shared_.num_inputs = shared_.num_routed = 0;
    block_.WaitForPrevious();
    const bool has_observed = state_.outcome->observed_layer == layer_;
    const int64_t number = model_.num_steps[layer_];
    block_.Sync();
    if (has_observed) {
      Record(number);
      if (number >= model_.window) LearnFrom(number - model_.window);
    }
    block_.Sync();
    SumNeedsAhead(block_, state_, layer_, first_use_, inputs_, shared_.num_inputs);
  }

 private:
  EXPERTFLOW_DEVICE void Record(int64_t number) {
    EXPERTFLOW_NO_UNROLL
    for (int32_t e = thread_; e < model_.num_experts; e += block_.num_threads()) {
      RecordExpert(number, e);
    }
    NeedStep& step = model_.steps[model_.StepIndex(layer_, number)];
    if (thread_ < NeedRules::kNumSources) {
      const int32_t source_layer = model_.SourceLayer(layer_, thread_);
      const int64_t latest = source_layer == layer_ ? number : model_.num_steps[source_layer] - 1;
      step.source_steps[thread_] = thread_ == 1 ? latest - 1 : latest;
    }
    block_.Sync();
    if (thread_ == 0) {
      step.number = number;
      step.num_experts = state_.latest_count[layer_] = shared_.num_routed;
      model_.num_steps[layer_] = number + 1;
      state_.outcome->observed_layer = -1;
    }
    block_.Sync();
  }

  EXPERTFLOW_DEVICE void RecordExpert(int64_t number, int32_t e) {
    const NeedObserved observed = state_.observed[e];
    const int64_t index = int64_t{layer_} * model_.num_experts + e;
    int16_t& frequency = model_.frequency[int64_t{layer_} * model_.width + e];
    const int32_t logit = observed.score - NeedRules::Carried(model_.scores[index]);
    frequency = static_cast<int16_t>(NeedRules::Decayed(frequency) +
                                     (observed.is_routed != 0 ? NeedRules::kUse : 0));
    model_.scores[index] = observed.score;
    model_.Foreseen(layer_, number)[e] = NeedRules::SigmoidIndex(logit);
    expert_key_[index] = PredictedNeed::KeyOf(observed.score);
    if (observed.is_routed == 0) return;
    const int32_t place = block_.Add(shared_.num_routed, 1);
    model_.Routed(layer_, number)[place] = e;
    state_.latest[int64_t{layer_} * model_.num_experts + place] = e;
  }

  EXPERTFLOW_DEVICE void LearnFrom(int64_t past) {
    FindUses(past);
    AddInputs(past);
    block_.Sync();
    const int16_t* foreseen = model_.Foreseen(layer_, past);
    EXPERTFLOW_NO_UNROLL
    for (int32_t e = thread_; e < model_.width; e += block_.num_threads()) {
      const int32_t label =
          first_use_[e] > model_.window ? 0 : NeedRules::Label(first_use_[e], model_.window);
      first_use_[e] = NeedRules::Gradient(label, model_.sigmoid[foreseen[e]]);
    }
    block_.Sync();
    StepWeights(first_use_);
  }

  // first_use_[expert]: how many tokens after `past` it is used first, if within the window.
  EXPERTFLOW_DEVICE void FindUses(int64_t past) {
    EXPERTFLOW_NO_UNROLL
    for (int32_t distance = 1 + warp_; distance <= model_.window; distance += num_warps_) {
      const NeedStep* step = model_.Step(layer_, past + distance);
      const int32_t* routed = model_.Routed(layer_, past + distance);
      EXPERTFLOW_NO_UNROLL
      for (int32_t i = lane_; i < step->num_experts; i += Block::kWarpSize) {
        block_.Min(first_use_[routed[i]], distance);
      }
    }
  }

  EXPERTFLOW_DEVICE void AddInputs(int64_t past) {
    EXPERTFLOW_NO_UNROLL
    for (int32_t s = warp_; s < NeedRules::kNumSources; s += num_warps_) {
      const int64_t number = model_.Step(layer_, past)->source_steps[s];
      const int32_t source_layer = model_.SourceLayer(layer_, s);
      const NeedStep* step = model_.Step(source_layer, number);
      const int32_t count = step == nullptr ? 0 : step->num_experts;
      EXPERTFLOW_NO_UNROLL
      for (int32_t i = lane_; i < count; i += Block::kWarpSize) {
        const int32_t row = model_.WeightRow(layer_, s, model_.Routed(source_layer, number)[i]);
        inputs_[block_.Add(shared_.num_inputs, 1)] = row;
      }
    }
  }

  EXPERTFLOW_DEVICE void StepWeights(const int32_t* gradient) {
    EXPERTFLOW_NO_UNROLL
    for (int32_t i = warp_; i < shared_.num_inputs; i += num_warps_) {
      EXPERTFLOW_NO_UNROLL
      for (int32_t e = 4 * lane_; e < model_.width; e += 4 * Block::kWarpSize) {
        int16_t* row = model_.Weights(inputs_[i]);
        Four<int16_t> weights = ReadFour(row, e);
        EXPERTFLOW_UNROLL
        for (int32_t j = 0; j < 4; ++j) {
          weights.of[j] = NeedRules::Stepped(weights.of[j], static_cast<int16_t>(gradient[e + j]));
        }
        *reinterpret_cast<Four<int16_t>*>(row + e) = weights;
      }
    }
  }

  Block& block_;
  BlockLearnerShared& shared_;
  const BlockNeedState& state_;
  const NeedState& model_;
  int32_t* const inputs_;     // [kNumSources * num_experts] rows of the weights
  int32_t* const first_use_;  // [width], then the gradients
  int64_t* const expert_key_;
  const int32_t layer_;
  const int32_t thread_;
  const int32_t lane_;
  const int32_t warp_;
  const int32_t num_warps_;
};

}  // namespace expertflow
