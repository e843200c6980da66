#pragma once

#include <cstdint>
#include <type_traits>

#include "core/block_selection.h"
#include "core/eviction/decayed_frequency.h"
#include "core/host_device.h"
#include "core/ids.h"
#include "core/layer_plan.h"
#include "core/own_slots.h"
#include "core/planning.h"
#include "core/slot_table.h"

// Plans one layer of a decode step with a block of threads, as Planner::PlanLayer does, from the
// same functions (core/planning.h). `Block` is what core/block_selection.h says, with
// WaitForPrevious(), before which nothing is read that earlier work of the stream writes,
// Min(value, other), atomic, CopyAsync(to, from), of a word into shared memory, for which
// WaitForCopies() waits, and Release(word, value), which lets the host see `value` only after all
// that the block wrote before.
//
// Reads every slot once, all loads at once, and nothing that depends on them but the rows' own
// experts: a block on one multiprocessor waits for latency, not for bandwidth. Whether a routed
// expert is resident is seen by the thread that has its slot (`slot_expert` and `expert_slot` say
// the same), so no thread follows a chain of loads from the expert to its slot.

namespace expertflow {

// For a RowState: the id was there before, and is no row.
constexpr int32_t kRepeated = -1;

// Lies in the shared memory of the block, followed by `first_of_expert`.
struct BlockPlannerShared {
  BlockSelection selection;
  // By place in the routed ids.
  SlotId slot[kMaxRoutedIds];
  int32_t state[kMaxRoutedIds];  // a RowState, or kRepeated
  int32_t num_rows;
  int32_t num_resident;
  int32_t num_bad_ids;
  int32_t log2_table[DecayedFrequency::kTableSize];
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
    OwnSlots<Policy> own(planning_, request_.layer, first_of_expert_, thread_,
                         block_.num_threads());
    PrepareShared();
    block_.WaitForPrevious();
    // Only asked for: to convert one before the barrier would be to wait for it.
    const bool wide = request_.ids.int64 != nullptr;
    const int64_t id64 = has_id_ && wide ? request_.ids.int64[thread_] : 0;
    const int32_t id32 = has_id_ && !wide ? request_.ids.int32[thread_] : 0;
    block_.Sync();
    if (has_id_) NoteRouted(wide ? id64 : id32);
    const PlanClock clock = *request_.clock;
    now_ = clock.now + 1;
    sequence_ = clock.sequence + 1;
    own.Load(now_);
    block_.Sync();
    block_.WaitForCopies();
    const LayerPlanStatus status = PlanRows(own);
    WritePlan(status);
    if (status == LayerPlanStatus::kPlanned) UpdateTable();
  }

 private:
  static constexpr int32_t kNotRouted = OwnSlots<Policy>::kNotRouted;

  // Reads nothing that an earlier kernel writes.
  EXPERTFLOW_DEVICE void PrepareShared() {
    for (int32_t e = thread_; e < planning_.table.num_experts; e += block_.num_threads()) {
      first_of_expert_[e] = kNotRouted;
    }
    if (has_id_) {
      shared_.slot[thread_] = SlotId::kNone;
      shared_.state[thread_] = Index(RowState::kMiss);
    }
    if (thread_ == 0) {
      shared_.num_rows = shared_.num_resident = shared_.num_bad_ids = 0;
      shared_.selection.num_listed[0] = shared_.selection.num_listed[1] = 0;
    }
    if constexpr (std::is_same_v<Policy, DecayedFrequency>) {
      // Looked up at the very end, when a row's key is known: by then it is near.
      for (int32_t i = thread_; i < DecayedFrequency::kTableSize; i += block_.num_threads()) {
        block_.CopyAsync(shared_.log2_table[i], planning_.eviction.log2_1p_exp2_q24[i]);
      }
      planning_.eviction.log2_1p_exp2_q24 = shared_.log2_table;
    }
  }

  EXPERTFLOW_DEVICE void NoteRouted(int64_t id) {
    if (id < 0 || id >= planning_.table.num_experts) {
      block_.Add(shared_.num_bad_ids, 1);
      return;
    }
    expert_ = static_cast<int32_t>(id);
    block_.Min(first_of_expert_[expert_], thread_);
  }

  EXPERTFLOW_DEVICE LayerPlanStatus PlanRows(OwnSlots<Policy>& own) {
    if (shared_.num_bad_ids > 0) return LayerPlanStatus::kBadExpertId;
    FindRows(own);
    block_.Sync();
    const int32_t num_misses = shared_.num_rows - shared_.num_resident;
    if (num_misses > 0 && SelectSmallest(block_, shared_.selection, own, num_misses) < num_misses) {
      return LayerPlanStatus::kNeedsWaves;
    }
    OrderRows();
    return LayerPlanStatus::kPlanned;
  }

  // Which ids are rows, and where those that are resident are.
  EXPERTFLOW_DEVICE void FindRows(OwnSlots<Policy>& own) {
    if (has_id_) {
      is_row_ = first_of_expert_[expert_] == thread_;
      if (is_row_) {
        block_.Add(shared_.num_rows, 1);
        key_ = planning_.table.expert_key[Index(RowExpert())];
      } else {
        shared_.state[thread_] = kRepeated;
      }
    }
    own.SparePlanned([&](int32_t place, SlotId slot, RowState state) {
      shared_.slot[place] = slot;
      shared_.state[place] = Index(state);
      block_.Add(shared_.num_resident, 1);
    });
  }

  // Hits, then late hits, then misses, each in order of first appearance.
  EXPERTFLOW_DEVICE void OrderRows() {
    if (!has_id_) return;
    state_ = shared_.state[thread_];
    int32_t before = 0;  // rows of the same state
    for (int32_t i = 0; i < request_.ids.count; ++i) {
      const int32_t state = shared_.state[i];
      num_hits_ += state == Index(RowState::kHit) ? 1 : 0;
      num_loading_ += state == Index(RowState::kLoading) ? 1 : 0;
      before += i < thread_ && state == state_ ? 1 : 0;
    }
    row_ = before + (state_ == Index(RowState::kHit)       ? 0
                     : state_ == Index(RowState::kLoading) ? num_hits_
                                                           : num_hits_ + num_loading_);
    slot_ = state_ == Index(RowState::kMiss)
                ? static_cast<SlotId>(shared_.selection.victims[before])
                : shared_.slot[thread_];
  }

  // What the host sees of it is complete when the sequence number says so.
  EXPERTFLOW_DEVICE void WritePlan(LayerPlanStatus status) {
    const bool planned = status == LayerPlanStatus::kPlanned;
    if (planned && is_row_) {
      const PlanRow row{expert_, slot_, static_cast<RowState>(state_), 0, kNoRow};
      request_.plan->rows[row_] = row;
      if (request_.host_plan != nullptr) request_.host_plan->rows[row_] = row;
    }
    if (thread_ == 0) {
      const int32_t num_rows = planned ? shared_.num_rows : 0;
      FillHeader(*request_.plan, status, num_rows);
      request_.plan->sequence = request_.clock->sequence = sequence_;
      if (request_.host_plan != nullptr) FillHeader(*request_.host_plan, status, num_rows);
    }
    if (request_.host_plan == nullptr) return;
    block_.Sync();
    // Takes about as long as all the rest, so not by a warp that has rows to place meanwhile.
    if (thread_ == block_.num_threads() - 1) {
      block_.Release(request_.host_plan->sequence, sequence_);
    }
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

  EXPERTFLOW_DEVICE void UpdateTable() {
    const auto add = [this](int64_t& counter, int64_t amount) { block_.Add(counter, amount); };
    if (planning_.policy == PolicyKind::kOnDemand) {
      for (int32_t s = thread_; s < planning_.table.num_slots; s += block_.num_threads()) {
        DropIfReady(planning_, static_cast<SlotId>(s), add);
      }
      block_.Sync();
    }
    if (is_row_ && state_ == Index(RowState::kMiss)) {
      PlaceMiss(planning_, slot_, RowExpert(), key_, now_, /*streaming=*/false, add);
      if (request_.fetch == MissFetch::kSameStream) {
        planning_.table.slot_state[Index(slot_)] = SlotState::kReady;
      }
    } else if (is_row_) {
      RecordUse(planning_, slot_, RowExpert(), key_, now_, /*streaming=*/false);
    }
    if (thread_ != 0) return;
    request_.clock->now = now_;
    LayerStatistics& counts = planning_.statistics[request_.layer];
    add(counts.hits, num_hits_);
    add(counts.late_hits, num_loading_);
    add(counts.misses, shared_.num_rows - num_hits_ - num_loading_);
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
  int32_t state_ = kRepeated;
  int32_t row_ = 0;
  SlotId slot_ = SlotId::kNone;
  // Of the plan; known to every thread with an id, and 0 for the others.
  int32_t num_hits_ = 0;
  int32_t num_loading_ = 0;
};

}  // namespace expertflow
