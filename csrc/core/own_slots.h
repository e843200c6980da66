#pragma once

#include <cstdint>
#include <limits>

#include "core/block_selection.h"
#include "core/host_device.h"
#include "core/ids.h"
#include "core/planning.h"
#include "core/slot_table.h"

namespace expertflow {

// The slots of one thread: every num_threads()-th of the layer's range. A tile of them is held in
// registers; only a table of more than one tile is read again with every visit.
template <class Policy>
class OwnSlots {
 public:
  static constexpr int32_t kPerTile = 4;
  static constexpr int32_t kNotRouted = std::numeric_limits<int32_t>::max();

  // `first_of_expert` [num_experts]: an expert's first place in the routed ids, or kNotRouted.
  EXPERTFLOW_DEVICE OwnSlots(const PlanningView& planning, int32_t layer,
                             const int32_t* first_of_expert, int32_t thread, int32_t num_threads)
      : planning_(planning),
        range_(RangeOf(planning, layer)),
        first_expert_(layer * planning.table.num_experts),
        first_of_expert_(first_of_expert),
        thread_(thread),
        num_threads_(num_threads) {}

  // Reads the first tile, for a plan at tick `now`.
  EXPERTFLOW_DEVICE void Load(Tick now) {
    now_ = now;
    LoadTile(range_.begin);
  }

  // Keeps the slots of routed experts from being taken; calls found(place in the ids, slot, state)
  // for each.
  template <class Found>
  EXPERTFLOW_DEVICE void SparePlanned(Found&& found) {
    SpareTile(range_.begin, found);
    for (int32_t first = range_.begin + tile_size(); first < range_.end; first += tile_size()) {
      LoadTile(first);
      SpareTile(first, found);
    }
  }

  // Calls visit(candidate) for every slot that may be taken.
  template <class Visitor>
  EXPERTFLOW_DEVICE void Visit(Visitor&& visit) {
    const bool fits_registers = range_.end - range_.begin <= tile_size();
    for (int32_t first = range_.begin; first < range_.end; first += tile_size()) {
      if (!fits_registers) {
        LoadTile(first);
        SpareTile(first, [](int32_t, SlotId, RowState) {});
      }
      EXPERTFLOW_UNROLL
      for (int32_t k = 0; k < kPerTile; ++k) {
        if (rank_[k] != kNoRank) visit(Candidate{rank_[k], SlotOf(first, k)});
      }
    }
  }

 private:
  EXPERTFLOW_DEVICE int32_t tile_size() const { return kPerTile * num_threads_; }

  EXPERTFLOW_DEVICE int32_t SlotOf(int32_t first, int32_t k) const {
    return first + k * num_threads_ + thread_;
  }

  // Without branches: all loads are on their way before the first use.
  EXPERTFLOW_DEVICE void LoadTile(int32_t first) {
    const SlotTableView& table = planning_.table;
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kPerTile; ++k) {
      const int32_t s = SlotOf(first, k);
      const bool exists = s < range_.end;
      const int32_t at = exists ? s : range_.end - 1;
      const SlotState state = table.slot_state[at];
      const bool dropped = planning_.policy == PolicyKind::kOnDemand && state == SlotState::kReady;
      const bool may_take = MayTake(table, at, now_, /*spare_predicted=*/false);
      const int64_t rank = Policy::Rank(planning_.eviction, table, at, now_);
      const int32_t local_expert = Index(table.slot_expert[at]) - first_expert_;
      rank_[k] = !(exists & may_take) ? kNoRank : dropped ? kEmptyKey : rank;
      local_expert_[k] = exists & !dropped ? local_expert : -1;
      in_flight_[k] = InFlight(state);
    }
  }

  template <class Found>
  EXPERTFLOW_DEVICE void SpareTile(int32_t first, Found&& found) {
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kPerTile; ++k) {
      if (local_expert_[k] < 0 || local_expert_[k] >= planning_.table.num_experts) continue;
      const int32_t place = first_of_expert_[local_expert_[k]];
      if (place == kNotRouted) continue;
      rank_[k] = kNoRank;
      found(place, static_cast<SlotId>(SlotOf(first, k)),
            in_flight_[k] ? RowState::kLoading : RowState::kHit);
    }
  }

  const PlanningView& planning_;
  const SlotRange range_;
  const int32_t first_expert_;
  const int32_t* const first_of_expert_;
  const int32_t thread_;
  const int32_t num_threads_;
  Tick now_ = 0;
  int64_t rank_[kPerTile];  // kNoRank: not to be taken
  int32_t local_expert_[kPerTile];
  bool in_flight_[kPerTile];
};

}  // namespace expertflow
