#pragma once

#include <cstdint>
#include <type_traits>

#include "core/block_need_scores.h"
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
// - WaitForPrevious(), before which nothing is read that the work before it in the stream writes,
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

// Lies in the shared memory of the block.
struct BlockPlannerShared {
  BlockSelection selection;
  alignas(16) int32_t routed[kMaxRoutedIds];  // experts, by place in the routed ids
  int32_t residence[kMaxRoutedIds];           // by place in the routed ids, see Residence
  struct MissingRow {
    int64_t key;
    int32_t expert;
  } missing[kMaxRoutedIds];
  int32_t num_bad_ids;
  uint64_t ids_known;  // a barrier of the block
  int32_t log2_table[DecayedFrequency::kTableSize];
  volatile int32_t fetched;  // of the kernel's parameters; means nothing
};

// Words of shared memory that the planner needs beside.
EXPERTFLOW_HD inline int32_t NumPlannerWords(const PlanningView& planning) {
  constexpr auto kWordsOfSlot = static_cast<int32_t>(sizeof(SlotOfLayer) / sizeof(int32_t));
  const int32_t num_experts = planning.table.num_experts;
  const int32_t num_words = (kWordsOfSlot + 1) * num_experts;
  if (planning.policy != PolicyKind::kPredictedNeed) return num_words;
  return num_words + NumScoresWords(planning.need.model);
}

// kOneTile: as IsOneTile (core/own_slots.h) says; a kernel of less code, which takes less time.
template <class Policy, class Block, bool kOneTile>
class BlockPlanner {
 public:
  // `shared_words` [NumPlannerWords(planning)] lie in shared memory too, aligned for SlotOfLayer.
  EXPERTFLOW_DEVICE BlockPlanner(Block& block, BlockPlannerShared& shared, int32_t* shared_words,
                                 const PlanningView& planning, const LayerPlanRequest& request)
      : block_(block),
        shared_(shared),
        of_layer_(reinterpret_cast<SlotOfLayer*>(shared_words)),
        for_need_(reinterpret_cast<int32_t*>(of_layer_ + planning.table.num_experts)),
        first_of_expert_(for_need_ + (kLearns ? NumScoresWords(planning.need.model) : 0)),
        need_(block, for_need_, planning.need, request.layer,
              FirstExpertOf(block.thread(), block.num_threads())),
        planning_(planning),
        request_(request),
        thread_(block.thread()) {}

  // Called by all threads, of which there are at least as many as ids.
  EXPERTFLOW_DEVICE void Run() {
    has_id_ = thread_ < request_.ids.count;
    Slots own(block_, planning_, request_.layer, first_of_expert_, of_layer_);
    PrepareShared();
    block_.WaitForCopies();
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
    Finish(status);
    block_.Mark(PlanPhase::kDone);
  }

 private:
  static constexpr bool kLearns = std::is_same_v<Policy, PredictedNeed>;
  struct NoModel {
    template <class... Anything>
    EXPERTFLOW_DEVICE explicit NoModel(Anything&&...) {}
  };
  using Slots = OwnSlots<Policy, Block, kOneTile>;
  // Reads nothing that the kernel before writes.
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

  // Hits, then late hits, then misses, each in order of first appearance.
  EXPERTFLOW_DEVICE void Finish(LayerPlanStatus status) {
    const bool planned = status == LayerPlanStatus::kPlanned;
    const int32_t miss = block_.num_threads() - 1 - thread_;  // from the last warp on
    const PlanRow resident = ResidentRow();
    const bool has_miss = planned && miss < rows_.total.misses;
    const PlanRow missing = has_miss ? MissingRow(miss) : PlanRow{};
    Occupant evicted{};
    if (has_miss) evicted = Slots::OccupantOf(shared_.selection.victims[miss].held);
    if (planned && rows_.own >= 0) {
      const bool hit = resident.state == RowState::kHit;
      WriteRow(hit ? rows_.before.hits : rows_.total.hits + rows_.before.loading, resident);
    }
    if (has_miss) WriteRow(rows_.total.hits + rows_.total.loading + miss, missing);
    WriteHeaders(status);
    if (planned) {
      if constexpr (std::is_same_v<Policy, OnDemand>) {
        DropAllReady();
        evicted = {};
      }
      if (has_miss) {
        PlaceMissing(missing, evicted, UsedKey(missing.expert, shared_.missing[miss].key));
      }
      if (rows_.own >= 0) {
        RecordUse(planning_, resident.slot, ToIndex(resident.expert), UsedKey(expert_, key_), now_,
                  /*streaming=*/false);
      }
      if (thread_ == Bookkeeper()) Count();
    }
    if constexpr (kLearns) {
      if (thread_ == Bookkeeper() && status != LayerPlanStatus::kBadExpertId) {
        need_.NoteOutcome(has_observed_, status == LayerPlanStatus::kNeedsWaves, now_);
      }
    }
  }

  EXPERTFLOW_DEVICE PlanRow ResidentRow() const {
    const RowState state = Residence::InFlight(rows_.own) ? RowState::kLoading : RowState::kHit;
    return {expert_, Residence::Slot(rows_.own), state, 0, kNoRow};
  }

  EXPERTFLOW_DEVICE PlanRow MissingRow(int32_t miss) const {
    return {shared_.missing[miss].expert, static_cast<SlotId>(shared_.selection.victims[miss].slot),
            RowState::kMiss, 0, kNoRow};
  }

  EXPERTFLOW_DEVICE void WriteRow(int32_t number, const PlanRow& row) {
    request_.plan->rows[number] = row;
    if (request_.host_plan != nullptr) request_.host_plan->rows[number] = row;
  }

  // What the host sees of the plan is complete when the sequence number says so.
  EXPERTFLOW_DEVICE void WriteHeaders(LayerPlanStatus status) {
    if (thread_ == Bookkeeper()) {
      WriteHeader(*request_.plan, status);
      request_.plan->sequence = request_.clock->sequence = clock_.sequence + 1;
      if (request_.host_plan != nullptr) WriteHeader(*request_.host_plan, status);
    }
    if (request_.host_plan == nullptr) return;
    block_.Sync();
    // Takes about as long as all the rest.
    if (thread_ == Bookkeeper()) {
      block_.Release(request_.host_plan->sequence, clock_.sequence + 1);
    }
  }

  EXPERTFLOW_DEVICE void WriteHeader(LayerPlan& plan, LayerPlanStatus status) const {
    const bool planned = status == LayerPlanStatus::kPlanned;
    plan.tick = now_;
    plan.status = status;
    plan.layer = request_.layer;
    plan.num_rows = planned ? rows_.total.rows() : 0;
    plan.num_hits = planned ? rows_.total.hits : 0;
    plan.num_loading = planned ? rows_.total.loading : 0;
  }

  // In all of the table, whatever the scope. Some states are read at once.
  EXPERTFLOW_DEVICE void DropAllReady() {
    constexpr int32_t kAtOnce = 4;
    const int32_t num_threads = block_.num_threads();
    EXPERTFLOW_NO_UNROLL
    for (int32_t first = thread_; first < planning_.table.num_slots;
         first += kAtOnce * num_threads) {
      bool ready[kAtOnce];
      EXPERTFLOW_UNROLL
      for (int32_t k = 0; k < kAtOnce; ++k) {
        const int32_t s = first + k * num_threads;
        ready[k] =
            s < planning_.table.num_slots && planning_.table.slot_state[s] == SlotState::kReady;
      }
      EXPERTFLOW_UNROLL
      for (int32_t k = 0; k < kAtOnce; ++k) {
        const auto slot = static_cast<SlotId>(first + k * num_threads);
        if (ready[k]) DropIfReady(planning_, slot, Adder());
      }
    }
    block_.Sync();
  }

  EXPERTFLOW_DEVICE void PlaceMissing(const PlanRow& row, const Occupant& evicted, int64_t key) {
    PlaceMiss(planning_, row.slot, evicted, ToIndex(row.expert), key, now_,
              /*streaming=*/false, Adder());
    if (request_.fetch == MissFetch::kSameStream) {
      planning_.table.slot_state[Index(row.slot)] = SlotState::kReady;
    }
  }

  EXPERTFLOW_DEVICE void Count() {
    request_.clock->now = now_;
    LayerStatistics& counts = planning_.statistics[request_.layer];
    Adder()(counts.hits, int64_t{rows_.total.hits});
    Adder()(counts.late_hits, int64_t{rows_.total.loading});
    Adder()(counts.misses, int64_t{rows_.total.misses});
  }

  EXPERTFLOW_DEVICE auto Adder() {
    return [this](auto& counter, auto amount) { block_.Add(counter, amount); };
  }

  EXPERTFLOW_DEVICE ExpertIndex ToIndex(int32_t expert) const {
    return expertflow::ToIndex(planning_.table, {request_.layer, expert});
  }

  // A thread of a warp that has few rows to finish, or none.
  EXPERTFLOW_DEVICE int32_t Bookkeeper() const { return block_.num_threads() / 2; }

  Block& block_;
  BlockPlannerShared& shared_;
  SlotOfLayer* const of_layer_;     // [num_experts]
  int32_t* const for_need_;         // [NumScoresWords(model)]
  int32_t* const first_of_expert_;  // [num_experts]
  std::conditional_t<kLearns, BlockNeedScores<Block>, NoModel> need_;
  PlanningView planning_;
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
