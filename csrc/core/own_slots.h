#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/four.h"
#include "core/host_device.h"
#include "core/ids.h"
#include "core/plan_rows.h"
#include "core/planning.h"
#include "core/slot_order.h"
#include "core/slot_table.h"

namespace expertflow {

// Neighbouring slots that a thread reads at once.
constexpr int32_t kSlotNeighbours = 4;

// How many threads have slots, if each has one tile.
inline int32_t NumSlotReads(const SlotRange& range) {
  return (range.end + kSlotNeighbours - 1) / kSlotNeighbours - range.begin / kSlotNeighbours;
}

// Whether a block of `num_threads` has one tile of slots and of experts.
inline bool IsOneTile(const PlanningView& planning, int32_t layer, int32_t num_threads) {
  return NumSlotReads(RangeOf(planning, layer)) <= num_threads &&
         planning.table.num_experts <= num_threads;
}

// A thread's first expert of the layer; the others follow num_threads apart. Experts are dealt from
// the last thread on and slots from the first: with threads enough none has both.
EXPERTFLOW_HD inline int32_t FirstExpertOf(int32_t thread, int32_t num_threads) {
  return num_threads - 1 - thread;
}

// The slot of an expert of the layer, as the thread of the slot tells the thread of the expert.
struct alignas(16) SlotOfLayer {
  static constexpr int32_t kNone = -1;

  int64_t key = 0;
  uint32_t order = kNoOrder;
  int32_t bits = kNone;  // 2 * its Residence + (1 unused)

  EXPERTFLOW_HD int32_t residence() const { return bits >> 1; }
  EXPERTFLOW_HD int32_t slot() const { return Index(Residence::Slot(residence())); }
  EXPERTFLOW_HD int32_t unused() const { return bits & 1; }
};

// What is in the slot of a SlotCandidate that says `held`.
EXPERTFLOW_HD inline Occupant OccupantOf(int32_t held) {
  return {static_cast<ExpertIndex>(held >> 1), (held & 1) != 0};
}

// The slots of one thread: some neighbours, read at once, and those that hold the thread's experts
// of the layer, once their own threads have told it. A tile of them is held in registers; only what
// takes more than one tile is read again with every visit.
template <class Policy, class Block, bool kOneTile>
class OwnSlots {
 public:
  static constexpr int32_t kNeighbours = kSlotNeighbours;
  static constexpr int32_t kPerTile = kNeighbours + 1;  // and that of an expert
  static constexpr int32_t kNotRouted = std::numeric_limits<int32_t>::max();

  // In shared memory, by the layer's experts: `first_of_expert` an expert's first place in the
  // routed ids, or kNotRouted, and `of_layer` the slots that hold them.
  EXPERTFLOW_DEVICE OwnSlots(const Block& block, const PlanningView& planning, int32_t layer,
                             const int32_t* first_of_expert, SlotOfLayer* of_layer)
      : planning_(planning),
        range_(RangeOf(planning, layer)),
        first_expert_(layer * planning.table.num_experts),
        first_of_expert_(first_of_expert),
        of_layer_(of_layer),
        thread_(block.thread()),
        num_threads_(block.num_threads()) {
    tile_size_ = kNeighbours * num_threads_;
    first_ = range_.begin / kNeighbours * kNeighbours + kNeighbours * thread_;
    last_ = (range_.end - 1) / kNeighbours * kNeighbours;
  }

  // Asks for the first tile.
  EXPERTFLOW_DEVICE void Load() { LoadTile(0); }

  // Ranks the slots for a plan at tick `now`, in two steps. First those that hold nothing of the
  // layer, about which nothing has to be known yet: fills `least` with the smallest orders of what
  // may be taken, by place in a tile. The rest are told to the threads of their experts.
  EXPERTFLOW_DEVICE void RankOthers(Tick now, uint32_t (&least)[kNeighbours]) {
    now_ = now;
    origin_ = Policy::Origin(planning_.eviction, now);
    EXPERTFLOW_UNROLL
    for (uint32_t& order : least) order = kNoOrder;
    // A loop even for one tile: else the compiler ranks before all that comes before has been asked
    // for, and has it wait for the slots.
    EXPERTFLOW_NO_UNROLL
    for (int32_t tile = 0; SlotOf(tile, 0) < range_.end; ++tile) {
      if (tile > 0) LoadTile(tile);
      RankTile(tile, [&](int32_t k, uint32_t order) { TellExpert(tile, k, order); });
      EXPERTFLOW_UNROLL
      for (int32_t k = 0; k < kNeighbours; ++k) least[k] = Smaller(least[k], order_[k]);
    }
  }

  // Then, behind a barrier, the rest. `scores` [num_experts]: of the layer's experts, if they are
  // new (PredictedNeed); a thread reads those of its own. What is routed is kept from being taken:
  // calls found(place in the ids, its Residence) for each.
  template <class Found>
  EXPERTFLOW_DEVICE uint32_t RankOfLayer(bool has_scores, const int32_t* scores, Found&& found) {
    uint32_t least = kNoOrder;
    EXPERTFLOW_NO_UNROLL
    for (int32_t tile = 0; IsTile(tile); ++tile) {
      const int32_t e = ExpertOf(tile);
      if (e >= planning_.table.num_experts) break;
      SlotOfLayer held = of_layer_[e];
      const int32_t place = first_of_expert_[e];
      if (held.bits == SlotOfLayer::kNone) continue;
      const bool in_flight = Residence::InFlight(held.residence());
      if (has_scores) TakeScore(held, scores[e]);
      if (place != kNotRouted) found(place, held.residence());
      if (place != kNotRouted || in_flight) held.order = kNoOrder;
      of_layer_[e] = held;
      least = Smaller(least, held.order);
    }
    order_[kNeighbours] = OrderOfExpert(0);
    return least;
  }

  // As core/block_selection.h says; slots that may not be taken have no order.
  template <class Visitor>
  EXPERTFLOW_DEVICE void VisitTiles(Visitor&& visit) {
    EXPERTFLOW_NO_UNROLL
    for (int32_t tile = 0; IsTile(tile); ++tile) {
      if (IsTile(1)) {
        LoadTile(tile);
        RankTile(tile, [](int32_t, uint32_t) {});
        order_[kNeighbours] = OrderOfExpert(tile);
      }
      visit(order_, [&](int32_t k) {
        return k < kNeighbours ? NeighbourAsCandidate(tile, k) : ExpertAsCandidate(tile);
      });
    }
  }

 private:
  static constexpr bool kOnDemand = std::is_same_v<Policy, OnDemand>;

  // Whether some thread has slots, or anything, in a tile.
  EXPERTFLOW_DEVICE bool HasSlots(int32_t tile) const {
    return SlotOf(tile, 0) - kNeighbours * thread_ < range_.end;
  }
  EXPERTFLOW_DEVICE bool IsTile(int32_t tile) const {
    if constexpr (kOneTile) return tile == 0;
    return HasSlots(tile) | (tile * num_threads_ < planning_.table.num_experts);
  }

  EXPERTFLOW_DEVICE int32_t SlotOf(int32_t tile, int32_t k) const {
    return first_ + tile * tile_size_ + k;
  }
  EXPERTFLOW_DEVICE int32_t ExpertOf(int32_t tile) const {
    return FirstExpertOf(thread_, num_threads_) + tile * num_threads_;
  }

  EXPERTFLOW_DEVICE bool Exists(int32_t tile, int32_t k) const {
    const int32_t slot = SlotOf(tile, k);
    return (slot >= range_.begin) & (slot < range_.end);
  }

  // Without branches, and uses nothing that it loads: all loads are on their way at once.
  EXPERTFLOW_DEVICE void LoadTile(int32_t tile) {
    const SlotTableView& table = planning_.table;
    const int32_t first = SlotOf(tile, 0) < last_ ? SlotOf(tile, 0) : last_;
    key_ = ReadFour(table.slot_key, first);
    needed_ = ReadFour(table.slot_needed, first);
    predicted_ = ReadFour(table.slot_predicted, first);
    expert_ = ReadFour(table.slot_expert, first);
    states_ = ReadFourBytes(table.slot_state, first);
    unused_ = ReadFourBytes(table.slot_unused, first);
  }

  // Calls tell(k, order) for slots of an expert of the layer. What may be taken is as MayTake says;
  // no slot can be of the plan yet: its tick is new. Without branches that some lanes would take,
  // but to tell.
  template <class Tell>
  EXPERTFLOW_DEVICE void RankTile(int32_t tile, Tell&& tell) {
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kNeighbours; ++k) {
      const bool is_dropped = kOnDemand & (State(k) == SlotState::kReady);
      if (is_dropped) key_.of[k] = kEmptyKey;
      const uint32_t order = Order(tile, k);
      const bool is_of_layer = Exists(tile, k) & !is_dropped & (LocalExpert(k) < NumExperts());
      const bool may_take = Exists(tile, k) & !is_of_layer & !InFlight(State(k));
      if (is_of_layer) tell(k, order);
      order_[k] = order | (may_take ? 0 : kNoOrder);
    }
  }

  EXPERTFLOW_DEVICE void TellExpert(int32_t tile, int32_t k, uint32_t order) {
    const auto slot = static_cast<SlotId>(SlotOf(tile, k));
    const int32_t residence = Residence::Of(slot, InFlight(State(k)));
    of_layer_[LocalExpert(k)] = {key_.of[k], order, 2 * residence + Unused(k)};
  }

  // What PredictedNeed::RecordScore does to a slot.
  EXPERTFLOW_DEVICE void TakeScore(SlotOfLayer& held, int32_t score) {
    if (held.key < 0) return;
    planning_.table.slot_key[held.slot()] = held.key = PredictedNeed::KeyOf(score);
    held.order = OrderOf<Policy::kTieBits>(held.key, held.slot(), IsProtected(held.order), origin_);
  }

  EXPERTFLOW_DEVICE uint32_t OrderOfExpert(int32_t tile) const {
    const int32_t e = ExpertOf(tile);
    return e < planning_.table.num_experts ? of_layer_[e].order : kNoOrder;
  }

  EXPERTFLOW_DEVICE SlotCandidate NeighbourAsCandidate(int32_t tile, int32_t k) const {
    return {key_.of[k] + (IsProtected(order_[k]) ? kProtected : 0), SlotOf(tile, k),
            2 * Index(expert_.of[k]) + Unused(k)};
  }

  // Only where there is an order.
  EXPERTFLOW_DEVICE SlotCandidate ExpertAsCandidate(int32_t tile) const {
    const int32_t e = ExpertOf(tile);
    if (order_[kNeighbours] == kNoOrder) return {kNoRank, kHighestSlot, 0};
    const SlotOfLayer held = of_layer_[e];
    return {held.key + (IsProtected(held.order) ? kProtected : 0), held.slot(),
            2 * (first_expert_ + e) + held.unused()};
  }

  EXPERTFLOW_DEVICE uint32_t Order(int32_t tile, int32_t k) const {
    const SlotUse use{key_.of[k], needed_.of[k], predicted_.of[k]};
    const bool is_protected = Policy::IsProtected(planning_.eviction, use, now_);
    return OrderOf<Policy::kTieBits>(use.key, SlotOf(tile, k), is_protected, origin_);
  }

  EXPERTFLOW_DEVICE SlotState State(int32_t k) const {
    return static_cast<SlotState>(states_ >> 8 * k & 0xff);
  }
  EXPERTFLOW_DEVICE int32_t Unused(int32_t k) const {
    return static_cast<int32_t>(unused_ >> 8 * k & 1);
  }

  EXPERTFLOW_DEVICE static bool IsProtected(uint32_t order) { return order >> 31 != 0; }

  EXPERTFLOW_DEVICE uint32_t NumExperts() const {
    return static_cast<uint32_t>(planning_.table.num_experts);
  }

  // Out of the layer's range if it is of another layer.
  EXPERTFLOW_DEVICE uint32_t LocalExpert(int32_t k) const {
    return static_cast<uint32_t>(Index(expert_.of[k]) - first_expert_);
  }

  const PlanningView& planning_;
  const SlotRange range_;
  const int32_t first_expert_;
  const int32_t* const first_of_expert_;
  SlotOfLayer* const of_layer_;
  const int32_t thread_;
  const int32_t num_threads_;
  int32_t tile_size_;  // in slots
  int32_t first_;      // the thread's first slot in the first tile
  int32_t last_;       // the last that can be read with its neighbours
  Tick now_ = 0;
  int64_t origin_ = 0;
  Four<int64_t> key_{};
  Four<Tick> needed_{};
  Four<Tick> predicted_{};
  Four<ExpertIndex> expert_{};
  uint32_t states_ = 0;
  uint32_t unused_ = 0;
  // At first, and where it is kNoOrder: not to be taken.
  uint32_t order_[kPerTile] = {kNoOrder, kNoOrder, kNoOrder, kNoOrder, kNoOrder};
};

}  // namespace expertflow
