#pragma once

#include <cstddef>
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

// Words of shared memory that scoring needs.
EXPERTFLOW_HD inline int32_t NumScoresWords(const NeedState& model) {
  return NumCopiedWords(model) + model.num_experts;
}

// The first half of what NeedModel::Observe (eviction/need_model.h) does, by the block of threads
// that plans (core/block_planner.h): scores a layer's experts after what is routed now. The second
// half, which records that and learns, is core/block_need_learner.h.
//
// The plan waits for it. What can be known before the layer routes is known already, if the block
// learned after the plan of the layer before (core/block_need_ahead.h), and is found out here
// otherwise. The weights of what is routed now are in shared memory by then, if they fit.
template <class Block>
class BlockNeedScores {
 public:
  static constexpr int32_t kAtOnce = 8;  // rows that are read

  // `shared_words` [NumScoresWords(model)] lie in shared memory, aligned for four words.
  // `first_expert` is the first that the thread scores; the others follow num_threads() apart.
  EXPERTFLOW_DEVICE BlockNeedScores(Block& block, int32_t* shared_words,
                                    const BlockNeedState& state, int32_t layer,
                                    int32_t first_expert)
      : block_(block),
        state_(state),
        model_(state.model),
        copied_(reinterpret_cast<int16_t*>(shared_words)),
        scores_(shared_words + NumCopiedWords(state.model)),
        weights_(state.model.Weights(state.model.WeightRow(layer, 0, 0))),
        layer_(layer),
        first_expert_(first_expert),
        may_use_copy_(state.model.num_layers > 1 && NumCopiedWords(state.model) > 0) {}

  // Copies weights, before the wait for the previous kernel. Only the lesson of the same layer
  // writes them. If the last lesson was that of the layer before, it had waited for all earlier
  // ones before it let this kernel start; if not, the copy is not used, see Observe.
  EXPERTFLOW_DEVICE void CopyWeights() {
    const int32_t num_eights = NumCopiedWords(model_) / 4;
    auto* to = reinterpret_cast<EightWeights*>(copied_);
    const auto* from = reinterpret_cast<const EightWeights*>(weights_);
    EXPERTFLOW_NO_UNROLL
    for (int32_t i = block_.thread(); i < num_eights; i += block_.num_threads()) {
      block_.CopyAsync(to[i], from[i]);
    }
  }

  // Asks for all else that does not depend on what is routed now.
  EXPERTFLOW_DEVICE void Ask() {
    outcome_ = *state_.outcome;
    ahead_ = state_.ahead[first_expert_ < model_.num_experts ? first_expert_ : 0];
  }

  // Whether the plan of tick `now` is the first to see its routes.
  EXPERTFLOW_DEVICE bool IsNew(Tick now) const {
    return outcome_.retried_layer != layer_ || outcome_.retried_tick != now;
  }

  // Whether the thread's warp has experts to score.
  EXPERTFLOW_DEVICE bool HasExperts() const { return IsOfWarp(first_expert_); }

  // Scores the layer's experts. `routed` are the experts of the ids, of which there are num_ids,
  // with zeros behind them up to a multiple of kAtOnce. `first_of_expert` [num_experts] is an
  // expert's first place there, or `not_routed`. Called by whole warps, behind a barrier.
  // Afterwards a thread can read the scores of its own experts, and behind another barrier all.
  EXPERTFLOW_DEVICE void Observe(const int32_t* routed, int32_t num_ids,
                                 const int32_t* first_of_expert, int32_t not_routed) {
    EXPERTFLOW_NO_UNROLL
    for (int32_t e = first_expert_; IsOfWarp(e); e += block_.num_threads()) {
      const int32_t existing = e < model_.num_experts ? e : 0;
      if (e != first_expert_) ahead_ = state_.ahead[existing];
      // Of one layer, the lesson just before may have changed the weights since they were copied.
      const bool is_copied = (ahead_.layer == layer_) & may_use_copy_;
      if (ahead_.layer != layer_) ahead_ = FindOut(existing);
      WeightSum sum{ahead_.sum, ahead_.num_inputs};
      AddRouted(sum, is_copied, existing, routed, num_ids, first_of_expert);
      if (e < model_.num_experts) Score(e, sum, ahead_.rest, first_of_expert[e] != not_routed);
    }
  }

  EXPERTFLOW_DEVICE const int32_t* scores() const { return scores_; }

  // Whether there is something to record, and whether the plan found no slots and comes again; by
  // one thread, at its end.
  EXPERTFLOW_DEVICE void NoteOutcome(bool has_observed, bool comes_again, Tick now) {
    *state_.outcome = {now, comes_again ? layer_ : -1, has_observed ? layer_ : -1};
  }

 private:
  struct alignas(16) EightWeights {  // copied at once
    int16_t of[8];
  };

  // Whether one of the warp's experts exists of which this thread's is `e`.
  EXPERTFLOW_DEVICE bool IsOfWarp(int32_t e) const {
    return e / Block::kWarpSize * Block::kWarpSize < model_.num_experts;
  }

  // Adds the rows of what is routed now: of the copy, or of the weights about it as the first
  // source. Of few layers, some sources behind are the same step. Called by whole warps.
  EXPERTFLOW_DEVICE void AddRouted(WeightSum& to, bool is_copied, int32_t e, const int32_t* routed,
                                   int32_t num_ids, const int32_t* first_of_expert) {
    const int32_t lane = block_.thread() % Block::kWarpSize;
    EXPERTFLOW_NO_UNROLL
    for (int32_t first = 0; first < num_ids; first += Block::kWarpSize) {
      const int32_t place = first + lane;
      const bool is_row = place < num_ids && first_of_expert[routed[place]] == place;
      const uint32_t rows = block_.Ballot(is_row);
      const int32_t end = num_ids - first < Block::kWarpSize ? num_ids - first : Block::kWarpSize;
      EXPERTFLOW_NO_UNROLL
      for (int32_t i = 0; i < end; i += kAtOnce) {
        // Not one call with either pointer: that would have no address space.
        to.sum += is_copied ? SumRows(copied_, e, routed + first + i, rows >> i)
                            : SumRows(weights_, e, routed + first + i, rows >> i);
      }
      to.num_inputs += CountBits(rows);
      EXPERTFLOW_NO_UNROLL
      for (int32_t s = 1 + model_.num_layers; s < NeedRules::kNumSources; s += model_.num_layers) {
        const int16_t* behind = model_.Weights(model_.WeightRow(layer_, s, 0));
        EXPERTFLOW_NO_UNROLL
        for (int32_t i = 0; i < end; ++i) {
          to.sum += (rows >> i & 1) != 0 ? behind[routed[first + i] * model_.width + e] : 0;
        }
        to.num_inputs += CountBits(rows);
      }
    }
  }

  // Of kAtOnce places the rows that are set in `rows`; all are read at once.
  EXPERTFLOW_DEVICE int32_t SumRows(const int16_t* weights, int32_t e, const int32_t* routed,
                                    uint32_t rows) const {
    int32_t found[size_t{kAtOnce}];
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; k += 4) {
      const Four<int32_t> experts = ReadFour(routed, k);
      EXPERTFLOW_UNROLL
      for (int32_t j = 0; j < 4; ++j) found[k + j] = weights[experts.of[j] * model_.width + e];
    }
    int32_t sum = 0;
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; ++k) sum += (rows & uint32_t{1} << k) != 0 ? found[k] : 0;
    return sum;
  }

  EXPERTFLOW_DEVICE void Score(int32_t e, const WeightSum& sum, int32_t rest, bool is_routed) {
    const int32_t score = NeedRules::Scaled(sum.sum, sum.num_inputs, model_.top_k) + rest +
                          (is_routed ? 2 * NeedRules::kUse : 0);
    scores_[e] = score;
    state_.observed[e] = {score, is_routed ? 1 : 0};
  }

  // What SumNeedsAhead does, for one expert. Seldom, and the block waits for instructions that lie
  // between others: short rather than fast. With IsThisStep and AddLatestWeights it has 150 more.
  EXPERTFLOW_DEVICE NeedAhead FindOut(int32_t e) const {
    NeedAhead ahead{0, 0, RestOfScore(model_, layer_, e), layer_};
    EXPERTFLOW_NO_UNROLL
    for (int32_t s = 1; s < NeedRules::kNumSources; ++s) {
      const int32_t source_layer = model_.SourceLayer(layer_, s);
      if (s != 1 && source_layer == layer_) continue;
      const int16_t* weights = model_.Weights(model_.WeightRow(layer_, s, 0));
      const int32_t* latest = state_.latest + int64_t{source_layer} * model_.num_experts;
      const int32_t count = state_.latest_count[source_layer];
      EXPERTFLOW_NO_UNROLL
      for (int32_t i = 0; i < count; ++i) ahead.sum += weights[latest[i] * model_.width + e];
      ahead.num_inputs += count;
    }
    return ahead;
  }

  Block& block_;
  const BlockNeedState& state_;
  const NeedState& model_;
  int16_t* const copied_;         // [num_experts * width], or none
  int32_t* const scores_;         // [num_experts]
  const int16_t* const weights_;  // of what is routed now, the layer's first row
  const int32_t layer_;
  const int32_t first_expert_;
  const bool may_use_copy_;

  NeedOutcome outcome_{};
  NeedAhead ahead_{};  // of the thread's first expert
};

}  // namespace expertflow
