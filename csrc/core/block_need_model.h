#pragma once

#include <cstdint>

#include "core/eviction/need_state.h"
#include "core/host_device.h"
#include "core/ids.h"

// What NeedModel::Observe (eviction/need_model.h) does, by a block of threads and in two parts: the
// scores inside a plan, what is learned in a kernel of its own behind it. From the same functions,
// so both agree bit by bit. `Block` is what core/block_planner.h says.

namespace expertflow {

// Lies in the shared memory of the block.
struct BlockNeedShared {
  int32_t num_inputs;
  int32_t num_routed;
};

// Words of shared memory that the model needs beside.
EXPERTFLOW_HD inline int32_t NumNeedWords(int32_t num_experts) {
  return (1 + NeedRules::kNumSources) * num_experts;
}

// Four neighbouring weights, read at once.
struct alignas(8) FourWeights {
  int16_t of[4];
};

template <class Block>
class BlockNeedModel {
 public:
  // `shared_words` [NumNeedWords(num_experts)] lie in shared memory.
  EXPERTFLOW_DEVICE BlockNeedModel(Block& block, BlockNeedShared& shared, int32_t* shared_words,
                                   const BlockNeedState& state, int32_t layer)
      : block_(block),
        shared_(shared),
        state_(state),
        model_(state.model),
        scores_(shared_words),
        inputs_(shared_words + state.model.num_experts),
        layer_(layer),
        thread_(block.thread()),
        lane_(block.thread() % Block::kWarpSize),
        warp_(block.thread() / Block::kWarpSize),
        layer_of_warp_(warp_ < NeedRules::kNumSources ? model_.SourceLayer(layer, warp_) : 0),
        layer_of_thread_(thread_ < NeedRules::kNumSources ? model_.SourceLayer(layer, thread_)
                                                          : 0) {}

  EXPERTFLOW_DEVICE void PrepareShared() {
    EXPERTFLOW_NO_UNROLL
    for (int32_t e = thread_; e < model_.num_experts; e += block_.num_threads()) scores_[e] = 0;
    if (thread_ == 0) shared_.num_inputs = shared_.num_routed = 0;
  }

  // Asks for all that does not depend on what is routed now: some warps each for what one source
  // routed, some threads each for the step of one.
  EXPERTFLOW_DEVICE void Ask() {
    retried_ = *state_.retried;
    number_ = model_.num_steps[layer_];
    if (thread_ < NeedRules::kNumSources) source_steps_ = model_.num_steps[layer_of_thread_];
    if (warp_ > 0 && warp_ < NeedRules::kNumSources) {
      num_latest_ = state_.latest_count[layer_of_warp_];
      if (lane_ < model_.num_experts) latest_ = Latest(layer_of_warp_)[lane_];
    }
    if (thread_ < model_.num_experts) {
      frequency_ = Frequency()[thread_];
      score_ = Scores()[thread_];
    }
  }

  // Whether the plan of tick `now` is the first to see its routes.
  EXPERTFLOW_DEVICE bool IsNew(Tick now) const {
    return retried_.layer != layer_ || retried_.tick != now;
  }

  // Scores the layer's experts. `first_of_expert` says which are routed, `row_expert` which of them
  // is the thread's own, or -1. Afterwards scores() can be read. Called by all threads, of which
  // there are kNumSources warps at least, behind a barrier; ends with one.
  EXPERTFLOW_DEVICE void Observe(const int32_t* first_of_expert, int32_t not_routed,
                                 int32_t row_expert) {
    AddInputs(row_expert);
    block_.Sync();
    SumWeights();
    block_.Sync();
    EXPERTFLOW_NO_UNROLL
    for (int32_t e = thread_; e < model_.num_experts; e += block_.num_threads()) {
      ScoreExpert(e, first_of_expert[e] != not_routed);
    }
    block_.Sync();
  }

  EXPERTFLOW_DEVICE const int32_t* scores() const { return scores_; }

  // Records the step that was observed: at the end of a plan, since nothing in it waits for that.
  // Called by all threads.
  EXPERTFLOW_DEVICE void Record(int32_t row_expert) {
    if (row_expert >= 0) {
      model_.Routed(layer_, number_)[place_] = Latest(layer_)[place_] = row_expert;
    }
    NeedStep& step = model_.steps[model_.StepIndex(layer_, number_)];
    if (thread_ < NeedRules::kNumSources) {
      step.source_steps[thread_] =
          IsThisStep(thread_, layer_of_thread_) ? number_ : source_steps_ - 1;
    }
    if (thread_ != 0) return;
    step.number = number_;
    step.num_experts = state_.latest_count[layer_] = shared_.num_routed;
    model_.num_steps[layer_] = number_ + 1;
    state_.to_learn[layer_] = number_;
  }

  // Whether the plan found no slots and comes again; by one thread, at its end.
  EXPERTFLOW_DEVICE void NoteOutcome(bool comes_again, Tick now) {
    *state_.retried = {now, comes_again ? layer_ : -1};
  }

  // Learns, once, from the step whose needs are known with the last one that was observed.
  // `first_use` [width] lies in shared memory.
  EXPERTFLOW_DEVICE void Learn(int32_t* first_use) {
    PrepareShared();
    EXPERTFLOW_NO_UNROLL
    for (int32_t e = thread_; e < model_.width; e += block_.num_threads()) {
      first_use[e] = model_.window + 1;
    }
    block_.WaitForPrevious();
    const int64_t number = state_.to_learn[layer_];
    block_.Sync();
    if (thread_ == 0) state_.to_learn[layer_] = -1;
    if (number < model_.window) return;
    const int64_t past = number - model_.window;
    FindUses(past, first_use);
    AddPastInputs(past);
    block_.Sync();
    const int16_t* foreseen = model_.Foreseen(layer_, past);
    EXPERTFLOW_NO_UNROLL
    for (int32_t e = thread_; e < model_.width; e += block_.num_threads()) {
      const int32_t label =
          first_use[e] > model_.window ? 0 : NeedRules::Label(first_use[e], model_.window);
      first_use[e] = NeedRules::Gradient(label, model_.sigmoid[foreseen[e]]);
    }
    block_.Sync();
    StepWeights(first_use);
  }

 private:
  EXPERTFLOW_DEVICE int32_t* Latest(int32_t layer) const {
    return state_.latest + int64_t{layer} * model_.num_experts;
  }
  EXPERTFLOW_DEVICE int16_t* Frequency() const {
    return model_.frequency + int64_t{layer_} * model_.width;
  }
  EXPERTFLOW_DEVICE int32_t* Scores() const {
    return model_.scores + int64_t{layer_} * model_.num_experts;
  }

  EXPERTFLOW_DEVICE void AddInput(int32_t source, int32_t routed) {
    inputs_[block_.Add(shared_.num_inputs, 1)] = model_.WeightRow(layer_, source, routed);
  }

  // Whether a source, which is of `source_layer`, is the step that is being observed.
  EXPERTFLOW_DEVICE bool IsThisStep(int32_t source, int32_t source_layer) const {
    return source != 1 && source_layer == layer_;
  }

  EXPERTFLOW_DEVICE void AddInputs(int32_t row_expert) {
    if (row_expert >= 0) {
      place_ = block_.Add(shared_.num_routed, 1);
      AddInput(0, row_expert);
      const bool turns_round = model_.num_layers <= NeedRules::kLayersBack;
      EXPERTFLOW_NO_UNROLL
      for (int32_t s = 2; turns_round && s < NeedRules::kNumSources; ++s) {
        if (IsThisStep(s, model_.SourceLayer(layer_, s))) AddInput(s, row_expert);
      }
    }
    if (warp_ == 0 || warp_ >= NeedRules::kNumSources) return;
    if (IsThisStep(warp_, layer_of_warp_)) return;
    EXPERTFLOW_NO_UNROLL
    for (int32_t i = lane_; i < num_latest_; i += Block::kWarpSize) {
      AddInput(warp_, i == lane_ ? latest_ : Latest(layer_of_warp_)[i]);
    }
  }

  // A warp takes every so-many-th row, some at once.
  EXPERTFLOW_DEVICE void SumWeights() {
    constexpr int32_t kAtOnce = 4;
    const int32_t num_warps = block_.num_threads() / Block::kWarpSize;
    EXPERTFLOW_NO_UNROLL
    for (int32_t first = warp_; first < shared_.num_inputs; first += kAtOnce * num_warps) {
      EXPERTFLOW_NO_UNROLL
      for (int32_t e = 4 * lane_; e < model_.width; e += 4 * Block::kWarpSize) {
        FourWeights weights[kAtOnce];
        EXPERTFLOW_UNROLL
        for (int32_t k = 0; k < kAtOnce; ++k) {
          const int32_t i = first + k * num_warps;
          weights[k] = i < shared_.num_inputs ? *Four(inputs_[i], e) : FourWeights{};
        }
        EXPERTFLOW_UNROLL
        for (int32_t j = 0; j < 4; ++j) {
          int32_t sum = 0;
          EXPERTFLOW_UNROLL
          for (int32_t k = 0; k < kAtOnce; ++k) sum += weights[k].of[j];
          if (e + j < model_.num_experts) block_.Add(scores_[e + j], sum);
        }
      }
    }
  }

  EXPERTFLOW_DEVICE FourWeights* Four(int32_t row, int32_t expert) const {
    return reinterpret_cast<FourWeights*>(model_.Weights(row) + expert);
  }

  EXPERTFLOW_DEVICE void ScoreExpert(int32_t e, bool used) {
    const bool asked_for = e == thread_;
    const int16_t before = asked_for ? frequency_ : Frequency()[e];
    const auto frequency =
        static_cast<int16_t>(NeedRules::Decayed(before) + (used ? NeedRules::kUse : 0));
    const int32_t logit = NeedRules::Logit(scores_[e], shared_.num_inputs, model_.top_k, frequency);
    const int32_t score = NeedRules::Score(logit, asked_for ? score_ : Scores()[e]);
    scores_[e] = Scores()[e] = score;
    Frequency()[e] = frequency;
    model_.Foreseen(layer_, number_)[e] = NeedRules::SigmoidIndex(logit);
  }

  // first_use[expert]: how many tokens after `past` it is used first, if within the window.
  EXPERTFLOW_DEVICE void FindUses(int64_t past, int32_t* first_use) {
    const int32_t num_warps = block_.num_threads() / Block::kWarpSize;
    EXPERTFLOW_NO_UNROLL
    for (int32_t distance = 1 + warp_; distance <= model_.window; distance += num_warps) {
      const NeedStep* step = model_.Step(layer_, past + distance);
      const int32_t* routed = model_.Routed(layer_, past + distance);
      EXPERTFLOW_NO_UNROLL
      for (int32_t i = lane_; i < step->num_experts; i += Block::kWarpSize) {
        block_.Min(first_use[routed[i]], distance);
      }
    }
  }

  EXPERTFLOW_DEVICE void AddPastInputs(int64_t past) {
    const int32_t num_warps = block_.num_threads() / Block::kWarpSize;
    EXPERTFLOW_NO_UNROLL
    for (int32_t s = warp_; s < NeedRules::kNumSources; s += num_warps) {
      const int64_t number = model_.Step(layer_, past)->source_steps[s];
      const int32_t source_layer = model_.SourceLayer(layer_, s);
      const NeedStep* step = model_.Step(source_layer, number);
      const int32_t count = step == nullptr ? 0 : step->num_experts;
      EXPERTFLOW_NO_UNROLL
      for (int32_t i = lane_; i < count; i += Block::kWarpSize) {
        AddInput(s, model_.Routed(source_layer, number)[i]);
      }
    }
  }

  EXPERTFLOW_DEVICE void StepWeights(const int32_t* gradient) {
    const int32_t num_warps = block_.num_threads() / Block::kWarpSize;
    EXPERTFLOW_NO_UNROLL
    for (int32_t i = warp_; i < shared_.num_inputs; i += num_warps) {
      EXPERTFLOW_NO_UNROLL
      for (int32_t e = 4 * lane_; e < model_.width; e += 4 * Block::kWarpSize) {
        FourWeights weights = *Four(inputs_[i], e);
        EXPERTFLOW_UNROLL
        for (int32_t j = 0; j < 4; ++j) {
          weights.of[j] = NeedRules::Stepped(weights.of[j], static_cast<int16_t>(gradient[e + j]));
        }
        *Four(inputs_[i], e) = weights;
      }
    }
  }

  Block& block_;
  BlockNeedShared& shared_;
  const BlockNeedState& state_;
  const NeedState& model_;
  int32_t* const scores_;  // [num_experts], before them the sums of weights
  int32_t* const inputs_;  // [kNumSources * num_experts] rows of the weights
  const int32_t layer_;
  const int32_t thread_;
  const int32_t lane_;
  const int32_t warp_;
  const int32_t layer_of_warp_;    // of the source that is the warp's
  const int32_t layer_of_thread_;  // of the source that is the thread's

  NeedRetry retried_{};
  int64_t number_ = 0;  // of the step
  int64_t source_steps_ = 0;
  int32_t num_latest_ = 0;  // experts that the source routed last
  int32_t latest_ = 0;
  int16_t frequency_ = 0;  // of the expert that is the thread's
  int32_t score_ = 0;
  int32_t place_ = 0;  // of the thread's own expert among those routed
};

}  // namespace expertflow
