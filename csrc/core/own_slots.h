#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/block_selection.h"
#include "core/host_device.h"
#include "core/ids.h"
#include "core/planning.h"
#include "core/slot_table.h"

namespace expertflow {

// The slots of one thread. The warps take turns with groups of neighbours: so slots that were
// filled one after the other, and are as old, are in several warps (see core/block_selection.h),
// also those of a small range. A tile of them is held in registers; only a table of more than one
// tile is read again with every visit.
template <class Policy, class Block>
class OwnSlots {
 public:
  static constexpr int32_t kPerTile = 4;
  // Neighbours in a warp: fewer take more accesses to memory, more leave old slots in fewer warps.
  static constexpr int32_t kGroup = Block::kWarpSize < 8 ? Block::kWarpSize : 8;
  static constexpr int32_t kNotRouted = std::numeric_limits<int32_t>::max();

  // `first_of_expert` [num_experts + 1]: an expert's first place in the routed ids, or kNotRouted,
  // as always at the end.
  EXPERTFLOW_DEVICE OwnSlots(const Block& block, const PlanningView& planning, int32_t layer,
                             const int32_t* first_of_expert)
      : planning_(planning),
        range_(RangeOf(planning, layer)),
        first_expert_(layer * planning.table.num_experts),
        first_of_expert_(first_of_expert) {
    const int32_t num_warps = block.num_threads() / Block::kWarpSize;
    const int32_t warp = block.thread() / Block::kWarpSize;
    const int32_t lane = block.thread() % Block::kWarpSize;
    // One each where some warps would have none.
    const bool is_small = range_.end - range_.begin < num_warps * kGroup;
    const int32_t in_group = is_small ? 0 : lane % kGroup;
    const int32_t group = is_small ? lane : lane / kGroup;
    offset_ = (group * num_warps + warp) * (is_small ? 1 : kGroup) + in_group;
    num_threads_ = block.num_threads();
    tile_size_ = kPerTile * num_threads_;
    spare_ = Exists(range_.begin, 0) ? SlotOf(range_.begin, 0) : range_.begin;
  }

  // The layer's experts have new `scores` [num_experts], in shared memory (PredictedNeed).
  EXPERTFLOW_DEVICE void SetScores(const int32_t* scores) { scores_ = scores; }

  // Asks for the first tile.
  EXPERTFLOW_DEVICE void Load() { LoadTile(range_.begin); }

  // Ranks the slots for a plan at tick `now`, and keeps those of routed experts from being taken;
  // calls found(place in the ids, slot, whether it is in flight) for each. Returns the smallest
  // order of what may be taken.
  template <class Found>
  EXPERTFLOW_DEVICE uint32_t RankAll(Tick now, Found&& found) {
    now_ = now;
    origin_ = Policy::Origin(planning_.eviction, now);
    uint32_t least = RankTile(range_.begin, found);
    EXPERTFLOW_NO_UNROLL
    for (int32_t first = range_.begin + tile_size_; first < range_.end; first += tile_size_) {
      LoadTile(first);
      const uint32_t least_of_tile = RankTile(first, found);
      least = least_of_tile < least ? least_of_tile : least;
    }
    return least;
  }

  // As core/block_selection.h says; slots that may not be taken have no order.
  template <class Visitor>
  EXPERTFLOW_DEVICE void VisitTiles(Visitor&& visit) {
    const bool fits_registers = range_.end - range_.begin <= tile_size_;
    EXPERTFLOW_NO_UNROLL
    for (int32_t first = range_.begin; first < range_.end; first += tile_size_) {
      if (!fits_registers) {
        LoadTile(first);
        RankTile(first, [](int32_t, SlotId, bool) {});
      }
      visit(order_, [&](int32_t k) { return Candidate{rank_[k], SlotOf(first, k)}; });
    }
  }

 private:
  EXPERTFLOW_DEVICE int32_t SlotOf(int32_t first, int32_t k) const {
    return first + offset_ + k * num_threads_;
  }

  EXPERTFLOW_DEVICE bool Exists(int32_t first, int32_t k) const {
    return SlotOf(first, k) < range_.end;
  }

  // Without branches, and uses nothing that it loads: all loads are on their way at once.
  EXPERTFLOW_DEVICE void LoadTile(int32_t first) {
    const SlotTableView& table = planning_.table;
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kPerTile; ++k) {
      const int32_t at = Exists(first, k) ? SlotOf(first, k) : spare_;
      use_[k] = UseOf(table, at);
      expert_[k] = table.slot_expert[at];
      state_[k] = table.slot_state[at];
    }
  }

  // What may be taken is as MayTake says; no slot can be of the plan yet: its tick is new.
  template <class Found>
  EXPERTFLOW_DEVICE uint32_t RankTile(int32_t first, Found&& found) {
    constexpr bool kOnDemand = std::is_same_v<Policy, OnDemand>;
    const auto num_experts = static_cast<uint32_t>(planning_.table.num_experts);
    uint32_t least = kNoOrder;
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kPerTile; ++k) {
      const bool exists = Exists(first, k);
      const bool in_flight = InFlight(state_[k]);
      const bool dropped = kOnDemand && state_[k] == SlotState::kReady;
      const auto local_expert = static_cast<uint32_t>(Index(expert_[k]) - first_expert_);
      const bool of_layer = exists & !dropped & (local_expert < num_experts);
      if constexpr (std::is_same_v<Policy, PredictedNeed>) {
        if (of_layer && scores_ != nullptr) TakeScore(k, SlotOf(first, k), scores_[local_expert]);
      }
      const int32_t place = first_of_expert_[of_layer ? local_expert : num_experts];
      const bool routed = place != kNotRouted;
      if (routed) found(place, static_cast<SlotId>(SlotOf(first, k)), in_flight);
      rank_[k] = dropped ? kEmptyKey : Policy::Rank(planning_.eviction, use_[k], now_);
      // Without a branch that some lanes would take.
      order_[k] = OrderOf(rank_[k], origin_) | (exists & !in_flight & !routed ? 0 : kNoOrder);
      least = order_[k] < least ? order_[k] : least;
    }
    return least;
  }

  // What PredictedNeed::RecordScore does to a slot.
  EXPERTFLOW_DEVICE void TakeScore(int32_t k, int32_t slot, int32_t score) {
    if (use_[k].key < 0) return;
    planning_.table.slot_key[slot] = use_[k].key = PredictedNeed::KeyOf(score);
  }

  const PlanningView& planning_;
  const SlotRange range_;
  const int32_t first_expert_;
  const int32_t* const first_of_expert_;
  const int32_t* scores_ = nullptr;
  int32_t num_threads_;
  int32_t tile_size_;
  int32_t offset_;  // of the thread's first slot in a tile
  int32_t spare_;   // read where no slot exists; the thread's own if there are several tiles,
                    // since others write to theirs meanwhile
  Tick now_ = 0;
  int64_t origin_ = 0;
  SlotUse use_[kPerTile];
  ExpertIndex expert_[kPerTile];
  SlotState state_[kPerTile];
  int64_t rank_[kPerTile];
  uint32_t order_[kPerTile];  // kNoOrder: not to be taken
};

}  // namespace expertflow
