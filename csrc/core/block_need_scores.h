#pragma once

#include <cstdint>

#include "core/block_need_step.h"
#include "core/eviction/need_state.h"
#include "core/host_device.h"
#include "core/ids.h"
#include "core/layer_plan.h"

namespace expertflow {

// The first half of what NeedModel::Observe (eviction/need_model.h) does, by the block of threads
// that plans (core/block_planner.h): scores a layer's experts after what is routed now. The second
// half is core/block_need_learner.h.
//
// The plan waits for it. What the sources before this step add to the scores is summed already, if
// the block learned after the plan before (core/block_need_ahead.h), and is summed here otherwise.
template <class Block>
class BlockNeedScores {
 public:
  // `scores` [num_experts] lie in shared memory.
  EXPERTFLOW_DEVICE BlockNeedScores(Block& block, int32_t* scores, const BlockNeedState& state,
                                    int32_t layer)
      : block_(block),
        state_(state),
        model_(state.model),
        scores_(scores),
        layer_(layer),
        thread_(block.thread()),
        layer_of_thread_(thread_ < NeedRules::kNumSources ? model_.SourceLayer(layer, thread_) : 0),
        only_first_is_this_step_(model_.num_layers > NeedRules::kLayersBack) {}

  // Asks for all that does not depend on what is routed now, and for the first ids.
  EXPERTFLOW_DEVICE void Ask(const RoutedIds& ids) {
    retried_ = *state_.retried;
    ahead_ = *state_.ahead;
    number_ = model_.num_steps[layer_];
    source_steps_ = model_.num_steps[layer_of_thread_];
    if (thread_ < model_.num_experts) expert_ = Read(thread_);
    const int32_t lane = thread_ % Block::kWarpSize;
    if (lane < ids.count) id_of_lane_ = IdAt(ids, lane);
  }

  // Asks for the weights of the first ids, whether the layer has them or not. Called by all
  // threads.
  EXPERTFLOW_DEVICE void AskForWeights(int32_t num_ids) {
    const int32_t lane = thread_ % Block::kWarpSize;
    const bool exists = id_of_lane_ < static_cast<uint64_t>(model_.num_experts);
    const uint32_t id = exists ? static_cast<uint32_t>(id_of_lane_) : 0;
    uint32_t first_ids[kIdsAhead];
    bool is_repeated = false;
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kIdsAhead; ++k) {
      first_ids[k] = block_.OfLane(id, k);
      is_repeated |= (k < lane) & (first_ids[k] == id);
    }
    first_rows_ = block_.Ballot((lane < kIdsAhead) & (lane < num_ids) & !is_repeated);
    if (thread_ >= model_.num_experts) return;
    const int16_t* weights = model_.Weights(model_.WeightRow(layer_, 0, 0)) + thread_;
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kIdsAhead; ++k) {
      first_weights_[k] = weights[static_cast<int32_t>(first_ids[k]) * model_.width];
    }
  }

  // Adds them up, once nothing else is left to do before they come.
  EXPERTFLOW_DEVICE void SumFirstWeights() {
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kIdsAhead; ++k) {
      first_sum_ += (first_rows_ >> k & 1) != 0 ? first_weights_[k] : 0;
    }
  }

  // Whether the plan of tick `now` is the first to see its routes.
  EXPERTFLOW_DEVICE bool IsNew(Tick now) const {
    return retried_.layer != layer_ || retried_.tick != now;
  }

  // Scores the layer's experts. `routed` [num_ids] are the experts of the ids, `first_of_expert`
  // [num_experts] an expert's first place there, or `not_routed`. Called by all threads, behind a
  // barrier. Afterwards a thread can read the scores of its own experts, one in num_threads(), and
  // behind another barrier all.
  EXPERTFLOW_DEVICE void Observe(const int32_t* routed, int32_t num_ids,
                                 const int32_t* first_of_expert, int32_t not_routed) {
    EXPERTFLOW_NO_UNROLL
    for (int32_t e = thread_; e < model_.num_experts; e += block_.num_threads()) {
      if (e != thread_) expert_ = Read(e);
      const WeightSum sum = SumWeights(e, routed, num_ids, first_of_expert);
      Score(sum, first_of_expert[e] != not_routed);
      scores_[e] = expert_.score;
      if (model_.num_experts > block_.num_threads()) Store(e);
    }
  }

  EXPERTFLOW_DEVICE const int32_t* scores() const { return scores_; }

  // Records the step that was observed, in which `num_rows` experts are routed: `expert` at `place`
  // of them, or none of the thread's if below 0. At the end of a plan, since nothing in it waits
  // for that. Called by all threads.
  EXPERTFLOW_DEVICE void Record(int32_t expert, int32_t place, int32_t num_rows) {
    if (thread_ < model_.num_experts && model_.num_experts <= block_.num_threads()) Store(thread_);
    if (expert >= 0) {
      model_.Routed(layer_, number_)[place] = expert;
      state_.latest[int64_t{layer_} * model_.num_experts + place] = expert;
    }
    NeedStep& step = model_.steps[model_.StepIndex(layer_, number_)];
    if (thread_ < NeedRules::kNumSources) {
      const bool is_this_step = thread_ != 1 && layer_of_thread_ == layer_;
      step.source_steps[thread_] = is_this_step ? number_ : source_steps_ - 1;
    }
    if (thread_ != 0) return;
    step.number = number_;
    step.num_experts = state_.latest_count[layer_] = num_rows;
    model_.num_steps[layer_] = number_ + 1;
    state_.to_learn[layer_] = number_;
    state_.ahead->layer = -1;
  }

  // Whether the plan found no slots and comes again; by one thread, at its end.
  EXPERTFLOW_DEVICE void NoteOutcome(bool comes_again, Tick now) {
    *state_.retried = {now, comes_again ? layer_ : -1};
  }

 private:
  static constexpr int32_t kIdsAhead = 8;
  static_assert(kIdsAhead <= Block::kWarpSize);

  // What the model has of an expert.
  struct OfExpert {
    int32_t sum_ahead;
    int32_t score;
    int16_t frequency;
    int32_t logit = 0;
  };

  EXPERTFLOW_DEVICE OfExpert Read(int32_t e) const {
    return {state_.ahead_sums[e], Scores()[e], Frequency()[e]};
  }
  EXPERTFLOW_DEVICE int16_t* Frequency() const {
    return model_.frequency + int64_t{layer_} * model_.width;
  }
  EXPERTFLOW_DEVICE int32_t* Scores() const {
    return model_.scores + int64_t{layer_} * model_.num_experts;
  }

  EXPERTFLOW_DEVICE WeightSum SumWeights(int32_t e, const int32_t* routed, int32_t num_ids,
                                         const int32_t* first_of_expert) const {
    const auto is_row = [=](int32_t i, int32_t expert) { return first_of_expert[expert] == i; };
    const bool is_ahead = ahead_.layer == layer_;
    WeightSum sum;
    if (is_ahead) sum = {expert_.sum_ahead, ahead_.num_inputs};
    const int32_t num_known = e == thread_ ? kIdsAhead : 0;
    if (e == thread_) {
      sum.sum += first_sum_;
      sum.num_inputs += CountBits(first_rows_);
    }
    AddWeights(sum, model_, layer_, 0, e, routed, num_known, num_ids, is_row);
    // Mostly what is routed now is the first source alone.
    if (is_ahead && only_first_is_this_step_) return sum;
    EXPERTFLOW_NO_UNROLL
    for (int32_t s = 1; s < NeedRules::kNumSources; ++s) {
      if (IsThisStep(model_, layer_, s)) {
        AddWeights(sum, model_, layer_, s, e, routed, 0, num_ids, is_row);
      } else if (!is_ahead) {
        AddLatestWeights(sum, state_, layer_, s, e);
      }
    }
    return sum;
  }

  EXPERTFLOW_DEVICE void Score(const WeightSum& weights, bool used) {
    expert_.frequency =
        static_cast<int16_t>(NeedRules::Decayed(expert_.frequency) + (used ? NeedRules::kUse : 0));
    expert_.logit =
        NeedRules::Logit(weights.sum, weights.num_inputs, model_.top_k, expert_.frequency);
    expert_.score = NeedRules::Score(expert_.logit, expert_.score);
  }

  EXPERTFLOW_DEVICE void Store(int32_t e) const {
    Scores()[e] = expert_.score;
    Frequency()[e] = expert_.frequency;
    model_.Foreseen(layer_, number_)[e] = NeedRules::SigmoidIndex(expert_.logit);
  }

  Block& block_;
  const BlockNeedState& state_;
  const NeedState& model_;
  int32_t* const scores_;
  const int32_t layer_;
  const int32_t thread_;
  const int32_t layer_of_thread_;  // of the source that is the thread's
  const bool only_first_is_this_step_;

  NeedRetry retried_{};
  NeedAhead ahead_{};
  int64_t number_ = 0;  // of the step
  int64_t source_steps_ = 0;
  OfExpert expert_{};  // that the thread is scoring
  uint64_t id_of_lane_ = 0;
  uint32_t first_rows_ = 0;             // bits by place: which of the first ids are rows
  int16_t first_weights_[kIdsAhead]{};  // of the thread's expert, by place
  int32_t first_sum_ = 0;
};

}  // namespace expertflow
