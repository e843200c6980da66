#pragma once

#include <cstdint>
#include <type_traits>

#include "core/block_need_scores.h"
#include "core/block_plan_writer.h"
#include "core/block_planner_shared.h"
#include "core/block_selection.h"
#include "core/eviction/decayed_frequency.h"
#include "core/host_device.h"
#include "core/ids.h"
#include "core/layer_plan.h"
#include "core/own_slots.h"
#include "core/plan_phase.h"
#include "core/plan_rows.h"
#include "core/planning.h"
#include "core/slot_table.h"

// Plans one layer of a decode step with a block of threads, as Planner::PlanLayer does, from the
// same functions (core/planning.h). `Block` is what core/block_selection.h says, with
// - WaitForPrevious(), before which nothing is used that the work before it in the stream writes,
// - SyncWarp(),
// - a barrier of one use for some threads: one thread calls Expect(word, num_arrivals) before a
//   Sync(), behind which so many threads call Arrive(word) and any may call Await(word),
// - CopyAsync(to, from), of one or four words into shared memory, for which WaitForCopies() waits,
// - Release(word, value), which lets the host see `value` after all that the block wrote before,
// - Mark(phase), which says that a phase has ended.
//
// A block on one multiprocessor waits for latency, so the chain is kept short: one round trip for
// the ids, the tick, every slot and what a policy that learns knows of the experts, for the others
// one more, beside the ranks of slots, for the rows' own keys; and five barriers. If experts are
// scored, other warps have them than have slots, where there are threads enough. Whether a routed
// expert is resident is told by the thread that has its slot (`slot_expert` and `expert_slot` say
// the same), so no thread follows a chain of loads from the expert to its slot. Rows that are
// resident and rows that are missing are finished by different warps, at the same time. What a
// policy records is left to a kernel behind (core/block_need_learner.h).

namespace expertflow {

// kOneTile: as IsOneTile (core/own_slots.h) says; a kernel of less code, which takes less time.
template <class Policy, class Block, bool kOneTile>
class BlockPlanner {
 public:
  // `shared_words` [NumPlannerWords(planning)] lie in shared memory too, aligned for SlotOfLayer.
  EXPERTFLOW_DEVICE BlockPlanner(Block& block, BlockPlannerShared& shared, int32_t* shared_words,
                                 const PlanningView& planning, const LayerPlanRequest& request)
      : block_(block),
        shared_(shared),
        planning_(planning),
        of_layer_(reinterpret_cast<SlotOfLayer*>(shared_words)),
        first_of_expert_(BehindSlots() + (kLearns ? NumScoresWords(planning.need.model) : 0)),
        need_(block, BehindSlots(), planning.need, request.layer,
              FirstExpertOf(block.thread(), block.num_threads())),
        request_(request),
        thread_(block.thread()) {}

  // Called by all threads, of which there are at least as many as ids.
  EXPERTFLOW_DEVICE void Run() {
    has_id_ = thread_ < request_.ids.count;
    Slots own(block_, planning_, request_.layer, first_of_expert_, of_layer_);
    PrepareShared();
    block_.WaitForCopies();  // not behind the loads: that takes 0.1 us more
    block_.Mark(PlanPhase::kPrepared);
    block_.WaitForPrevious();
    block_.Mark(PlanPhase::kReleased);
    NoteRouted(AskForAll(own));
    now_ = clock_.now + 1;
    if constexpr (kLearns) ObserveNeeds();
    uint32_t of_others[Slots::kNeighbours];
    own.RankOthers(now_, of_others);
    ShareLeast(block_, shared_.selection, of_others);
    block_.Sync();
    block_.Mark(PlanPhase::kRouted);
    has_bad_ids_ = shared_.num_bad_ids > 0;
    if constexpr (kLearns) has_observed_ = !has_bad_ids_ && need_.IsNew(now_);
    const uint32_t least = Smaller(Smallest(of_others), RankOfLayer(own));
    SortLeast(block_, shared_.selection);
    if constexpr (!kLearns) UseKey();
    block_.Sync();
    block_.Mark(PlanPhase::kRanked);
    CountRows(block_, shared_.residence, request_.ids.count, rows_);
    block_.Mark(PlanPhase::kCounted);
    const LayerPlanStatus status = TakeSlots(own, least);
    block_.Mark(PlanPhase::kSelected);
    Write(status);
    block_.Mark(PlanPhase::kDone);
  }

 private:
  static constexpr bool kLearns = std::is_same_v<Policy, PredictedNeed>;
  struct NoModel {
    template <class... Anything>
    EXPERTFLOW_DEVICE explicit NoModel(Anything&&...) {}
  };
  using Slots = OwnSlots<Policy, Block, kOneTile>;

  EXPERTFLOW_DEVICE int32_t* BehindSlots() const {
    return reinterpret_cast<int32_t*>(of_layer_ + planning_.table.num_experts);
  }

  // Uses nothing that the kernel before writes: of weights see BlockNeedScores::CopyWeights.
  EXPERTFLOW_DEVICE void PrepareShared() {
    EXPERTFLOW_NO_UNROLL
    for (int32_t e = thread_; e < planning_.table.num_experts; e += block_.num_threads()) {
      first_of_expert_[e] = Slots::kNotRouted;
      of_layer_[e] = SlotOfLayer{};
    }
    if (has_id_) shared_.residence[thread_] = Residence::kMissing;
    if constexpr (kLearns) {
      constexpr int32_t kAtOnce = decltype(need_)::kAtOnce;
      static_assert(Block::kWarpSize % kAtOnce == 0 && kMaxRoutedIds % kAtOnce == 0);
      if (thread_ < request_.ids.count + kAtOnce && thread_ < kMaxRoutedIds) {
        shared_.routed[thread_] = 0;
      }
    }
    if (thread_ < BlockSelection::kNumBins) shared_.selection.least[thread_] = kNoOrder;
    if (thread_ == 0) {
      shared_.selection.num_listed[0] = shared_.selection.num_listed[1] = shared_.num_bad_ids = 0;
    }
    if constexpr (kLearns) {
      if (thread_ == 0 && request_.ids.count > 0) {
        block_.Expect(shared_.ids_known, request_.ids.count);
      }
      need_.CopyWeights();
    }
    if constexpr (std::is_same_v<Policy, DecayedFrequency>) {
      EXPERTFLOW_NO_UNROLL
      for (int32_t i = thread_; i < DecayedFrequency::kTableSize; i += block_.num_threads()) {
        block_.CopyAsync(shared_.log2_table[i], planning_.eviction.log2_1p_exp2_q24[i]);
      }
      planning_.eviction.log2_1p_exp2_q24 = shared_.log2_table;
    }
  }

  // Asks for the ids, the tick and the slots, and returns the thread's id. The barriers keep the
  // compiler from asking for slots first, whose data come last, and from using what has come before
  // it has asked for all.
  EXPERTFLOW_DEVICE uint64_t AskForAll(Slots& own) {
    uint64_t id = 0;
    if (has_id_) id = IdAt(request_.ids, thread_);
    clock_ = *request_.clock;
    if constexpr (kLearns) need_.Ask();
    block_.SyncWarp();
    own.Load();
    block_.Sync();
    return id;
  }

  EXPERTFLOW_DEVICE void NoteRouted(uint64_t id) {
    if (!has_id_) return;
    if (id >= static_cast<uint64_t>(planning_.table.num_experts)) {
      block_.Add(shared_.num_bad_ids, 1);
      return;
    }
    expert_ = static_cast<int32_t>(id);
    block_.Min(first_of_expert_[expert_], thread_);
    if constexpr (kLearns) {
      shared_.routed[thread_] = expert_;
    } else {
      key_ = planning_.table.expert_key[Index(ToIndex(expert_))];
    }
  }

  // An id that the layer has and that was not there before.
  EXPERTFLOW_DEVICE bool IsRow() const {
    return expert_ >= 0 && first_of_expert_[expert_] == thread_;
  }

  // As Planner::ObserveNeeds does, by the warps that have experts, once those have come that have
  // ids; the others rank slots meanwhile. What is scored for a bad id is not used.
  EXPERTFLOW_DEVICE void ObserveNeeds() {
    if (has_id_) block_.Arrive(shared_.ids_known);
    if (!need_.HasExperts() || !need_.IsNew(now_)) return;
    if (request_.ids.count > 0) block_.Await(shared_.ids_known);
    need_.Observe(shared_.routed, request_.ids.count, first_of_expert_, Slots::kNotRouted);
  }

  EXPERTFLOW_DEVICE uint32_t RankOfLayer(Slots& own) {
    if (has_id_ && !IsRow()) shared_.residence[thread_] = Residence::kRepeated;
    const int32_t* scores = nullptr;
    if constexpr (kLearns) scores = need_.scores();
    return own.RankOfLayer(has_observed_, scores, [this](int32_t place, int32_t residence) {
      shared_.residence[place] = residence;
    });
  }

  // The key of the thread's expert, from this plan on.
  EXPERTFLOW_DEVICE void UseKey() {
    if (expert_ >= 0) key_ = Policy::KeyOnUse(planning_.eviction, key_, now_);
  }

  // The same of any used expert: what learns has it in shared memory, or, where the plan comes
  // again, in the table; others have computed it early.
  EXPERTFLOW_DEVICE int64_t UsedKey(int32_t expert, int64_t computed) const {
    if constexpr (kLearns) {
      const int64_t key = has_observed_ ? PredictedNeed::KeyOf(need_.scores()[expert])
                                        : planning_.table.expert_key[Index(ToIndex(expert))];
      return Policy::KeyOnUse(planning_.eviction, key, now_);
    }
    return computed;
  }

  EXPERTFLOW_DEVICE LayerPlanStatus TakeSlots(Slots& own, uint32_t least) {
    if (has_bad_ids_) return LayerPlanStatus::kBadExpertId;
    if (rows_.total.misses == 0) return LayerPlanStatus::kPlanned;
    if (rows_.own == Residence::kMissing) shared_.missing[rows_.before.misses] = {key_, expert_};
    const int32_t num_found =
        SelectSmallest(block_, shared_.selection, own, least, rows_.total.misses);
    return num_found < rows_.total.misses ? LayerPlanStatus::kNeedsWaves
                                          : LayerPlanStatus::kPlanned;
  }

  EXPERTFLOW_DEVICE void Write(LayerPlanStatus status) {
    using Writer = BlockPlanWriter<Policy, Block>;
    Writer(block_, shared_, planning_, request_, clock_, rows_)
        .Write(status, expert_, key_,
               [this](int32_t expert, int64_t computed) { return UsedKey(expert, computed); });
    if constexpr (kLearns) {
      if (thread_ == Writer::Bookkeeper(block_) && status != LayerPlanStatus::kBadExpertId) {
        need_.NoteOutcome(has_observed_, status == LayerPlanStatus::kNeedsWaves, now_);
      }
    }
  }

  EXPERTFLOW_DEVICE ExpertIndex ToIndex(int32_t expert) const {
    return expertflow::ToIndex(planning_.table, {request_.layer, expert});
  }

  Block& block_;
  BlockPlannerShared& shared_;
  PlanningView planning_;
  SlotOfLayer* const of_layer_;     // [num_experts]
  int32_t* const first_of_expert_;  // [num_experts]
  std::conditional_t<kLearns, BlockNeedScores<Block>, NoModel> need_;
  const LayerPlanRequest& request_;
  const int32_t thread_;

  PlanClock clock_{};
  Tick now_ = 0;
  // Of this thread's id.
  bool has_id_ = false;
  int32_t expert_ = -1;
  int64_t key_ = 0;
  CountedRows rows_;
  bool has_bad_ids_ = false;
  bool has_observed_ = false;  // by the need model
};

}  // namespace expertflow
