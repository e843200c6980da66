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

  // `first_of_expert` [num_experts]: an expert's first place in the routed ids, or kNotRouted.
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

  // Asks for the first tile.
  EXPERTFLOW_DEVICE void Load() { LoadTile(range_.begin); }

  // Ranks the slots for a plan at tick `now` and returns the smallest order of what may be taken,
  // in two steps. First those of the first tile that hold nothing of the layer, about which nothing
  // has to be known yet.
  EXPERTFLOW_DEVICE uint32_t RankOthers(Tick now) {
    now_ = now;
    origin_ = Policy::Origin(planning_.eviction, now);
    return RankOfOthers(range_.begin);
  }

  // Then the rest. `scores` [num_experts], in shared memory: of the layer's experts, if they are
  // new (PredictedNeed), or nullptr. What is routed is kept from being taken: calls found(place in
  // the ids, slot, whether it is in flight) for each.
  template <class Found>
  EXPERTFLOW_DEVICE uint32_t RankRest(const int32_t* scores, Found&& found) {
    scores_ = scores;
    uint32_t least = RankOfLayer(range_.begin, found);
    EXPERTFLOW_NO_UNROLL
    for (int32_t first = range_.begin + tile_size_; first < range_.end; first += tile_size_) {
      LoadTile(first);
      least = Smaller(least, RankTile(first, found));
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
      visit(order_, [&](int32_t k) {
        const bool is_protected = order_[k] >> 31 != 0;
        return Candidate{use_[k].key + (is_protected ? kProtected : 0), SlotOf(first, k)};
      });
    }
  }

 private:
  static constexpr bool kOnDemand = std::is_same_v<Policy, OnDemand>;

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

  template <class Found>
  EXPERTFLOW_DEVICE uint32_t RankTile(int32_t first, Found&& found) {
    const uint32_t least = RankOfOthers(first);
    return Smaller(least, RankOfLayer(first, found));
  }

  // What may be taken is as MayTake says; no slot can be of the plan yet: its tick is new. Without
  // branches that some lanes would take.
  EXPERTFLOW_DEVICE uint32_t RankOfOthers(int32_t first) {
    uint32_t least = kNoOrder;
    is_of_layer_ = 0;
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kPerTile; ++k) {
      const bool is_dropped = kOnDemand & (state_[k] == SlotState::kReady);
      if (is_dropped) use_[k].key = kEmptyKey;
      const bool is_of_layer = Exists(first, k) & !is_dropped & (LocalExpert(k) < NumExperts());
      const bool may_take = Exists(first, k) & !is_of_layer & !InFlight(state_[k]);
      is_of_layer_ |= is_of_layer ? uint32_t{1} << k : 0;
      order_[k] = Order(k) | (may_take ? 0 : kNoOrder);
      least = Smaller(least, order_[k]);
    }
    return least;
  }

  template <class Found>
  EXPERTFLOW_DEVICE uint32_t RankOfLayer(int32_t first, Found&& found) {
    uint32_t least = kNoOrder;
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kPerTile; ++k) {
      if ((is_of_layer_ >> k & 1) == 0) continue;
      const int32_t slot = SlotOf(first, k);
      const bool in_flight = InFlight(state_[k]);
      if constexpr (std::is_same_v<Policy, PredictedNeed>) {
        if (scores_ != nullptr) TakeScore(k, slot, scores_[LocalExpert(k)]);
      }
      const int32_t place = first_of_expert_[LocalExpert(k)];
      if (place != kNotRouted) found(place, static_cast<SlotId>(slot), in_flight);
      if (place == kNotRouted && !in_flight) order_[k] = Order(k);
      least = Smaller(least, order_[k]);
    }
    return least;
  }

  EXPERTFLOW_DEVICE uint32_t Order(int32_t k) const {
    return OrderOf(use_[k].key, Policy::IsProtected(planning_.eviction, use_[k], now_), origin_);
  }

  EXPERTFLOW_DEVICE uint32_t NumExperts() const {
    return static_cast<uint32_t>(planning_.table.num_experts);
  }

  // Out of the layer's range if it is of another layer.
  EXPERTFLOW_DEVICE uint32_t LocalExpert(int32_t k) const {
    return static_cast<uint32_t>(Index(expert_[k]) - first_expert_);
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
  uint32_t is_of_layer_ = 0;  // bits by k: of an expert of the layer
  uint32_t order_[kPerTile];  // kNoOrder: not to be taken
};

}  // namespace expertflow
