#pragma once

#include <cstdint>

#include "core/block_need_step.h"
#include "core/eviction/need_state.h"
#include "core/four.h"
#include "core/host_device.h"
#include "core/ids.h"

namespace expertflow {

// Words of shared memory for the weights of what a layer routes now, or 0 if they are too many:
// then they are read where they are. Their number is a multiple of four.
EXPERTFLOW_HD inline int32_t NumCopiedWords(const NeedState& model) {
  constexpr int64_t kMaxWords = 64 * 1024 / sizeof(int32_t);
  const int64_t num_words = int64_t{model.num_experts} * model.width / 2;
  return num_words <= kMaxWords ? static_cast<int32_t>(num_words) : 0;
}

// The first half of what NeedModel::Observe (eviction/need_model.h) does, by the block of threads
// that plans (core/block_planner.h): scores a layer's experts after what is routed now. The second
// half, which records that and learns, is core/block_need_learner.h.
//
// The plan waits for it. What can be known before the layer routes is known already, if the block
// learned after the plan of the layer before (core/block_need_ahead.h), and is found out here
// otherwise. The weights of what is routed now are in shared memory by then.
template <class Block>
class BlockNeedScores {
 public:
  // `scores` [num_experts] and `copied` [NumCopiedWords(model)] lie in shared memory, the latter
  // aligned for Four<int32_t>. `first_expert` is the first that the thread scores; the others
  // follow num_threads() apart.
  EXPERTFLOW_DEVICE BlockNeedScores(Block& block, int32_t* scores, int32_t* copied,
                                    const BlockNeedState& state, int32_t layer,
                                    int32_t first_expert)
      : block_(block),
        state_(state),
        model_(state.model),
        scores_(scores),
        copied_(copied),
        weights_(state.model.Weights(state.model.WeightRow(layer, 0, 0))),
        layer_(layer),
        first_expert_(first_expert) {}

  // Copies weights, before the wait for the previous kernel: they were last written behind the last
  // plan of the same layer, and the plan or the lesson of another was waited for since. If not, the
  // copy is not used, see Observe.
  EXPERTFLOW_DEVICE void CopyWeights() {
    const int32_t num_words = NumCopiedWords(model_);
    const auto* words = reinterpret_cast<const int32_t*>(weights_);
    EXPERTFLOW_NO_UNROLL
    for (int32_t i = 4 * block_.thread(); i < num_words; i += 4 * block_.num_threads()) {
      block_.CopyAsync(*reinterpret_cast<Four<int32_t>*>(copied_ + i),
                       *reinterpret_cast<const Four<int32_t>*>(words + i));
    }
  }

  // Asks for all else that does not depend on what is routed now.
  EXPERTFLOW_DEVICE void Ask() {
    outcome_ = *state_.outcome;
    if (first_expert_ < model_.num_experts) ahead_ = state_.ahead[first_expert_];
  }

  // Whether the plan of tick `now` is the first to see its routes.
  EXPERTFLOW_DEVICE bool IsNew(Tick now) const {
    return outcome_.retried_layer != layer_ || outcome_.retried_tick != now;
  }

  // Scores the layer's experts. `routed` [num_ids] are the experts of the ids, `first_of_expert`
  // [num_experts] an expert's first place there, or `not_routed`. Called by all threads, behind a
  // barrier. Afterwards a thread can read the scores of its own experts, and behind another barrier
  // all.
  EXPERTFLOW_DEVICE void Observe(const int32_t* routed, int32_t num_ids,
                                 const int32_t* first_of_expert, int32_t not_routed) {
    EXPERTFLOW_NO_UNROLL
    for (int32_t e = first_expert_; e < model_.num_experts; e += block_.num_threads()) {
      if (e != first_expert_) ahead_ = state_.ahead[e];
      const bool is_ahead = ahead_.layer == layer_;
      if (!is_ahead) ahead_ = FindOut(e);
      WeightSum sum{ahead_.sum, ahead_.num_inputs};
      // Of one layer, the lesson just before may have changed the weights since they were copied.
      const bool is_copied = is_ahead & (model_.num_layers > 1) & (NumCopiedWords(model_) > 0);
      const auto* weights = is_copied ? reinterpret_cast<const int16_t*>(copied_) : weights_;
      const auto is_row = [=](int32_t i, int32_t expert) { return first_of_expert[expert] == i; };
      AddWeights<8>(sum, weights, model_.width, e, routed, num_ids, is_row);
      // Of few layers, some behind are this one.
      EXPERTFLOW_NO_UNROLL
      for (int32_t s = 1 + model_.num_layers; s < NeedRules::kNumSources; s += model_.num_layers) {
        const int16_t* behind = model_.Weights(model_.WeightRow(layer_, s, 0));
        AddWeights<1>(sum, behind, model_.width, e, routed, num_ids, is_row);
      }
      const bool is_routed = first_of_expert[e] != not_routed;
      scores_[e] = NeedRules::Scaled(sum.sum, sum.num_inputs, model_.top_k) + ahead_.rest +
                   (is_routed ? 2 * NeedRules::kUse : 0);
      state_.observed[e] = {scores_[e], is_routed ? 1 : 0};
    }
  }

  EXPERTFLOW_DEVICE const int32_t* scores() const { return scores_; }

  // Whether there is something to record, and whether the plan found no slots and comes again; by
  // one thread, at its end.
  EXPERTFLOW_DEVICE void NoteOutcome(bool has_observed, bool comes_again, Tick now) {
    *state_.outcome = {now, comes_again ? layer_ : -1, has_observed ? layer_ : -1};
  }

 private:
  // What SumNeedsAhead does, for one expert. Seldom: short rather than fast.
  EXPERTFLOW_DEVICE NeedAhead FindOut(int32_t e) const {
    WeightSum sum;
    EXPERTFLOW_NO_UNROLL
    for (int32_t s = 1; s < NeedRules::kNumSources; ++s) {
      if (!IsThisStep(model_, layer_, s)) AddLatestWeights<1>(sum, state_, layer_, s, e);
    }
    return {sum.sum, sum.num_inputs, RestOfScore(model_, layer_, e), layer_};
  }

  Block& block_;
  const BlockNeedState& state_;
  const NeedState& model_;
  int32_t* const scores_;
  int32_t* const copied_;
  const int16_t* const weights_;  // of what is routed now, the layer's first row
  const int32_t layer_;
  const int32_t first_expert_;

  NeedOutcome outcome_{};
  NeedAhead ahead_{};  // of the expert that the thread is scoring
};

}  // namespace expertflow
