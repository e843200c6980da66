#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "core/host_device.h"
#include "core/ids.h"

namespace expertflow {

enum class SlotState : uint8_t {
  kEmpty,
  kPosted,     // a transfer is queued
  kSubmitted,  // at least one chunk of it has started
  kReady,
};

// Keys below zero go first whatever the policy: an empty slot, then an expert that a long prompt
// streamed in (unless the policy protects it because it is predicted).
constexpr int64_t kEmptyKey = std::numeric_limits<int64_t>::min();
constexpr int64_t kStreamedKey = -1;
constexpr Tick kNever = -1;
constexpr int64_t kNeverUsed = -(int64_t{1} << 60);  // an `expert_key` before the first use

// Who is where: flat arrays of plain data, in host or device memory. Those of slots can be
// read four at once (core/four.h), also the last.
struct SlotTableView {
  int32_t num_layers;
  int32_t num_experts;  // per layer
  int32_t num_slots;

  SlotId* expert_slot;  // [num_layers * num_experts]
  int64_t* expert_key;  // [num_layers * num_experts] the policy's key after the last use, also of
                        // evicted experts
  ExpertIndex* slot_expert;   // [num_slots]
  SlotState* slot_state;      // [num_slots]
  uint32_t* slot_generation;  // [num_slots] grows with every assignment
  int64_t* slot_key;          // [num_slots] what the eviction policy ranks by, smallest first
  Tick* slot_needed;     // [num_slots] the last plan that needs the slot; that plan's slots are no
                         // victims
  Tick* slot_predicted;  // [num_slots] until when a prediction expects a use
  uint8_t* slot_unused;  // [num_slots] 1: prefetched and not used yet
};

EXPERTFLOW_HD inline ExpertIndex ToIndex(const SlotTableView& table, ExpertId id) {
  return static_cast<ExpertIndex>(id.layer * table.num_experts + id.expert);
}

EXPERTFLOW_HD inline ExpertId ToId(const SlotTableView& table, ExpertIndex index) {
  return {Index(index) / table.num_experts, Index(index) % table.num_experts};
}

EXPERTFLOW_HD inline bool InFlight(SlotState state) {
  return state == SlotState::kPosted || state == SlotState::kSubmitted;
}

// Empties a slot, which holds `held`: that is no longer resident.
EXPERTFLOW_HD inline void Unassign(const SlotTableView& table, SlotId slot, ExpertIndex held) {
  const int32_t s = Index(slot);
  if (held != ExpertIndex::kNone) table.expert_slot[Index(held)] = SlotId::kNone;
  table.slot_expert[s] = ExpertIndex::kNone;
  table.slot_state[s] = SlotState::kEmpty;
  table.slot_key[s] = kEmptyKey;
  table.slot_needed[s] = kNever;
  table.slot_predicted[s] = kNever;
  table.slot_unused[s] = 0;
}

EXPERTFLOW_HD inline void Unassign(const SlotTableView& table, SlotId slot) {
  Unassign(table, slot, table.slot_expert[Index(slot)]);
}

// How functions add to a counter where one thread does all the planning. Threads that plan together
// pass something atomic instead, which also need not wait for the value before.
struct AddPlainly {
  template <class Int>
  EXPERTFLOW_HD void operator()(Int& counter, Int amount) const {
    counter += amount;
  }
};

// Gives a slot that is not in flight and holds `held` to `expert`, which must not be resident; what
// the slot held is evicted.
template <class Add>
EXPERTFLOW_HD inline void Assign(const SlotTableView& table, SlotId slot, ExpertIndex held,
                                 ExpertIndex expert, const Add& add) {
  Unassign(table, slot, held);
  const int32_t s = Index(slot);
  table.slot_expert[s] = expert;
  table.slot_state[s] = SlotState::kPosted;
  add(table.slot_generation[s], uint32_t{1});
  table.expert_slot[Index(expert)] = slot;
}

EXPERTFLOW_HD inline void Assign(const SlotTableView& table, SlotId slot, ExpertIndex expert) {
  Assign(table, slot, table.slot_expert[Index(slot)], expert, AddPlainly());
}

// Owns the arrays of a table in host memory. All slots start empty.
class SlotTable {
 public:
  // Throws std::invalid_argument unless all three are positive and the indices fit 32 bits.
  SlotTable(int32_t num_layers, int32_t num_experts, int32_t num_slots);

  SlotTable(const SlotTable&) = delete;
  SlotTable& operator=(const SlotTable&) = delete;

  const SlotTableView& view() const { return view_; }

  // Becomes what `table`, of the same sizes, is at rest: what is on its way there is ready here,
  // and nothing is predicted or unused. Allocates nothing.
  void CopyAtRest(const SlotTableView& table);

 private:
  std::vector<SlotId> expert_slot_;
  std::vector<int64_t> expert_key_;
  std::vector<ExpertIndex> slot_expert_;
  std::vector<SlotState> slot_state_;
  std::vector<uint32_t> slot_generation_;
  std::vector<int64_t> slot_key_;
  std::vector<Tick> slot_needed_;
  std::vector<Tick> slot_predicted_;
  std::vector<uint8_t> slot_unused_;
  SlotTableView view_;
};

}  // namespace expertflow
