#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/block_selection.h"
#include "core/eviction/decayed_frequency.h"
#include "core/host_device.h"
#include "core/ids.h"
#include "core/layer_plan.h"
#include "core/planning.h"
#include "core/slot_table.h"

// Plans one layer of a decode step with a block of threads, as Planner::PlanLayer does, from the
// same functions (core/planning.h). `Block` is what core/block_selection.h says, with
// Min(value, other), atomic, and Release(word, value), which lets the host see `value` only after
// all that the block wrote before.
//
// Reads every slot once, all loads at once, and nothing that depends on them but the rows' own
// experts: a block on one multiprocessor waits for latency, not for bandwidth. Whether a routed
// expert is resident is seen by the thread that has its slot (`slot_expert` and `expert_slot` say
// the same), so no thread follows a chain of loads from the expert to its slot.

namespace expertflow {

// Lies in the shared memory of the block, followed by `first_of_expert`.
struct BlockPlannerShared {
  BlockSelection selection;
  // By place in the routed ids. An id that is there before is no row.
  SlotId slot[kMaxRoutedIds];
  RowState state[kMaxRoutedIds];
  bool is_row[kMaxRoutedIds];
  int32_t num_rows;
  int32_t num_resident;
  int32_t num_bad_ids;
  int32_t log2_table[DecayedFrequency::kTableSize];
};

// The slots of one thread: every num_threads()-th of the layer's range, kPerTile at a time.
template <class Policy>
class OwnSlots {
 public:
  static constexpr int32_t kPerTile = 4;

  EXPERTFLOW_DEVICE OwnSlots(const PlanningView& planning, int32_t layer, Tick now,
                             const int32_t* first_of_expert, int32_t thread, int32_t num_threads)
      : planning_(planning),
        range_(RangeOf(planning, layer)),
        first_expert_(layer * planning.table.num_experts),
        now_(now),
        first_of_expert_(first_of_expert),
        thread_(thread),
        num_threads_(num_threads) {
    const int32_t per_tile = kPerTile * num_threads;
    num_tiles_ = (range_.end - range_.begin + per_tile - 1) / per_tile;
  }

  // Reads the slots of a tile. Without branches: all loads are on their way before the first use.
  EXPERTFLOW_DEVICE void Load(int32_t tile) {
    const SlotTableView& table = planning_.table;
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kPerTile; ++k) {
      const int32_t s = SlotOf(tile, k);
      const bool exists = s < range_.end;
      const int32_t at = exists ? s : range_.end - 1;
      const SlotState state = table.slot_state[at];
      const bool dropped = planning_.policy == PolicyKind::kOnDemand && state == SlotState::kReady;
      const bool may_take = MayTake(table, at, now_, /*spare_predicted=*/false);
      const int64_t rank = Policy::Rank(planning_.eviction, table, at, now_);
      const ExpertIndex expert = table.slot_expert[at];
      rank_[k] = !(exists & may_take) ? kNoRank : dropped ? kEmptyKey : rank;
      local_expert_[k] = exists & !dropped ? Index(expert) - first_expert_ : -1;
      in_flight_[k] = InFlight(state);
    }
  }

  // Keeps the slots of routed experts from being taken; calls found(place in the ids, slot, state)
  // for each.
  template <class Found>
  EXPERTFLOW_DEVICE void SparePlanned(int32_t tile, Found&& found) {
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kPerTile; ++k) {
      if (local_expert_[k] < 0 || local_expert_[k] >= planning_.table.num_experts) continue;
      const int32_t place = first_of_expert_[local_expert_[k]];
      if (place == kNotRouted) continue;
      rank_[k] = kNoRank;
      found(place, static_cast<SlotId>(SlotOf(tile, k)),
            in_flight_[k] ? RowState::kLoading : RowState::kHit);
    }
  }

  // Calls visit(candidate) for every slot that may be taken.
  template <class Visitor>
  EXPERTFLOW_DEVICE void Visit(Visitor&& visit) {
    for (int32_t tile = 0; tile < num_tiles_; ++tile) {
      if (num_tiles_ > 1) {
        Load(tile);
        SparePlanned(tile, [](int32_t, SlotId, RowState) {});
      }
      EXPERTFLOW_UNROLL
      for (int32_t k = 0; k < kPerTile; ++k) {
        if (rank_[k] != kNoRank) visit(Candidate{rank_[k], SlotOf(tile, k)});
      }
    }
  }

  EXPERTFLOW_DEVICE int32_t num_tiles() const { return num_tiles_; }

  static constexpr int32_t kNotRouted = std::numeric_limits<int32_t>::max();

 private:
  EXPERTFLOW_DEVICE int32_t SlotOf(int32_t tile, int32_t k) const {
    return range_.begin + (tile * kPerTile + k) * num_threads_ + thread_;
  }

  const PlanningView& planning_;
  const SlotRange range_;
  const int32_t first_expert_;
  const Tick now_;
  const int32_t* const first_of_expert_;
  const int32_t thread_;
  const int32_t num_threads_;
  int32_t num_tiles_;
  int64_t rank_[kPerTile];  // kNoRank: not to be taken
  int32_t local_expert_[kPerTile];
  bool in_flight_[kPerTile];
};

template <class Policy, class Block>
class BlockPlanner {
 public:
  // `first_of_expert` [num_experts] lies in shared memory too.
  EXPERTFLOW_DEVICE BlockPlanner(Block& block, BlockPlannerShared& shared, int32_t* first_of_expert,
                                 const PlanningView& planning, const LayerPlanRequest& request)
      : block_(block),
        shared_(shared),
        first_of_expert_(first_of_expert),
        planning_(planning),
        request_(request),
        thread_(block.thread()) {}

  // Called by all threads, of which there are at least as many as ids.
  EXPERTFLOW_DEVICE void Run() {
    has_id_ = thread_ < request_.ids.count;
    const int64_t id = has_id_ ? request_.ids[thread_] : 0;
    now_ = request_.clock->now + 1;
    sequence_ = request_.clock->sequence + 1;
    ClearShared();
    block_.Sync();
    NoteRouted(id);
    OwnSlots<Policy> own(planning_, request_.layer, now_, first_of_expert_, thread_,
                         block_.num_threads());
    own.Load(0);
    block_.Sync();
    if (shared_.num_bad_ids > 0) return Refuse(LayerPlanStatus::kBadExpertId);
    FindRows(own);
    block_.Sync();
    const int32_t num_misses = shared_.num_rows - shared_.num_resident;
    if (num_misses > 0 && SelectSmallest(block_, shared_.selection, own, num_misses) < num_misses) {
      return Refuse(LayerPlanStatus::kNeedsWaves);
    }
    OrderRows();
    WritePlan();
    UpdateTable();
  }

 private:
  static constexpr int32_t kNotRouted = OwnSlots<Policy>::kNotRouted;

  EXPERTFLOW_DEVICE void ClearShared() {
    for (int32_t e = thread_; e < planning_.table.num_experts; e += block_.num_threads()) {
      first_of_expert_[e] = kNotRouted;
    }
    if (has_id_) {
      shared_.slot[thread_] = SlotId::kNone;
      shared_.state[thread_] = RowState::kMiss;
    }
    if (thread_ == 0) {
      shared_.num_rows = shared_.num_resident = shared_.num_bad_ids = 0;
      shared_.selection.num_listed[0] = shared_.selection.num_listed[1] = 0;
    }
    if constexpr (std::is_same_v<Policy, DecayedFrequency>) {
      // Looked up when the rows are known, after all other loads: from here it is near.
      for (int32_t i = thread_; i < DecayedFrequency::kTableSize; i += block_.num_threads()) {
        shared_.log2_table[i] = planning_.eviction.log2_1p_exp2_q24[i];
      }
      planning_.eviction.log2_1p_exp2_q24 = shared_.log2_table;
    }
  }

  EXPERTFLOW_DEVICE void NoteRouted(int64_t id) {
    if (!has_id_) return;
    if (id < 0 || id >= planning_.table.num_experts) {
      block_.Add(shared_.num_bad_ids, 1);
      return;
    }
    expert_ = static_cast<int32_t>(id);
    block_.Min(first_of_expert_[expert_], thread_);
  }

  // Which ids are rows, and where those that are resident are.
  EXPERTFLOW_DEVICE void FindRows(OwnSlots<Policy>& own) {
    if (has_id_) {
      is_row_ = first_of_expert_[expert_] == thread_;
      shared_.is_row[thread_] = is_row_;
      if (is_row_) {
        block_.Add(shared_.num_rows, 1);
        key_ = planning_.table.expert_key[Index(RowExpert())];
      }
    }
    for (int32_t tile = 0; tile < own.num_tiles(); ++tile) {
      if (tile > 0) own.Load(tile);
      own.SparePlanned(tile, [&](int32_t place, SlotId slot, RowState state) {
        shared_.slot[place] = slot;
        shared_.state[place] = state;
        block_.Add(shared_.num_resident, 1);
      });
    }
  }

  // Hits, then late hits, then misses, each in order of first appearance.
  EXPERTFLOW_DEVICE void OrderRows() {
    if (!has_id_) return;
    const RowState state = shared_.state[thread_];
    int32_t before = 0;  // rows of the same state
    for (int32_t i = 0; i < request_.ids.count; ++i) {
      if (!shared_.is_row[i]) continue;
      num_hits_ += shared_.state[i] == RowState::kHit ? 1 : 0;
      num_loading_ += shared_.state[i] == RowState::kLoading ? 1 : 0;
      before += i < thread_ && shared_.state[i] == state ? 1 : 0;
    }
    row_ = before + (state == RowState::kHit       ? 0
                     : state == RowState::kLoading ? num_hits_
                                                   : num_hits_ + num_loading_);
    const bool is_miss = state == RowState::kMiss;
    slot_ =
        is_miss ? static_cast<SlotId>(shared_.selection.victims[before]) : shared_.slot[thread_];
  }

  EXPERTFLOW_DEVICE void WritePlan() {
    if (is_row_) {
      const PlanRow row{expert_, slot_, shared_.state[thread_], 0, kNoRow};
      request_.plan->rows[row_] = row;
      if (request_.host_plan != nullptr) request_.host_plan->rows[row_] = row;
    }
    WriteHeader(LayerPlanStatus::kPlanned, shared_.num_rows);
  }

  // What the host sees of it is complete when the sequence number says so; all threads call.
  EXPERTFLOW_DEVICE void WriteHeader(LayerPlanStatus status, int32_t num_rows) {
    if (thread_ == 0) {
      FillHeader(*request_.plan, status, num_rows);
      request_.plan->sequence = request_.clock->sequence = sequence_;
      if (request_.host_plan != nullptr) FillHeader(*request_.host_plan, status, num_rows);
    }
    if (request_.host_plan == nullptr) return;
    block_.Sync();
    if (thread_ == 0) block_.Release(request_.host_plan->sequence, sequence_);
  }

  EXPERTFLOW_DEVICE void FillHeader(LayerPlan& plan, LayerPlanStatus status,
                                    int32_t num_rows) const {
    plan.tick = now_;
    plan.status = status;
    plan.layer = request_.layer;
    plan.num_rows = num_rows;
    plan.num_hits = num_hits_;
    plan.num_loading = num_loading_;
  }

  EXPERTFLOW_DEVICE void Refuse(LayerPlanStatus status) { WriteHeader(status, 0); }

  EXPERTFLOW_DEVICE void UpdateTable() {
    if (planning_.policy == PolicyKind::kOnDemand) {
      for (int32_t s = thread_; s < planning_.table.num_slots; s += block_.num_threads()) {
        DropIfReady(planning_, static_cast<SlotId>(s));
      }
      block_.Sync();
    }
    if (is_row_ && shared_.state[thread_] == RowState::kMiss) {
      PlaceMiss(planning_, slot_, RowExpert(), key_, now_, /*streaming=*/false);
      if (request_.fetch == MissFetch::kSameStream) {
        planning_.table.slot_state[Index(slot_)] = SlotState::kReady;
      }
    } else if (is_row_) {
      RecordUse(planning_, slot_, RowExpert(), key_, now_, /*streaming=*/false);
    }
    if (thread_ != 0) return;
    request_.clock->now = now_;
    LayerStatistics& counts = planning_.statistics[request_.layer];
    Count(counts.hits, num_hits_);
    Count(counts.late_hits, num_loading_);
    Count(counts.misses, shared_.num_rows - num_hits_ - num_loading_);
  }

  EXPERTFLOW_DEVICE ExpertIndex RowExpert() const {
    return ToIndex(planning_.table, {request_.layer, expert_});
  }

  Block& block_;
  BlockPlannerShared& shared_;
  int32_t* const first_of_expert_;
  PlanningView planning_;
  const LayerPlanRequest& request_;
  const int32_t thread_;

  Tick now_ = 0;
  uint64_t sequence_ = 0;
  // Of this thread's id.
  bool has_id_ = false;
  bool is_row_ = false;
  int32_t expert_ = 0;
  int64_t key_ = 0;  // before this plan
  int32_t row_ = 0;
  SlotId slot_ = SlotId::kNone;
  // Of the plan; known to every thread with an id, and 0 for the others.
  int32_t num_hits_ = 0;
  int32_t num_loading_ = 0;
};

}  // namespace expertflow
