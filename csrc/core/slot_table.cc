#include "core/slot_table.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace expertflow {
namespace {

size_t Checked(int64_t count, const char* what) {
  if (count <= 0 || count > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument(std::string(what) + " is " + std::to_string(count) +
                                ", which no slot table can have");
  }
  return static_cast<size_t>(count);
}

}  // namespace

SlotTable::SlotTable(int32_t num_layers, int32_t num_experts, int32_t num_slots) {
  Checked(num_layers, "num_layers");
  Checked(num_experts, "num_experts");
  const size_t slots = Checked((int64_t{num_slots} + 3) / 4 * 4, "num_slots, in fours,");
  const size_t experts =
      Checked(int64_t{num_layers} * num_experts, "the number of experts in all layers");
  expert_slot_.assign(experts, SlotId::kNone);
  expert_key_.assign(experts, kNeverUsed);
  slot_expert_.assign(slots, ExpertIndex::kNone);
  slot_state_.assign(slots, SlotState::kEmpty);
  slot_generation_.assign(slots, 0);
  slot_key_.assign(slots, kEmptyKey);
  slot_needed_.assign(slots, kNever);
  slot_predicted_.assign(slots, kNever);
  slot_unused_.assign(slots, 0);
  view_ = {num_layers,
           num_experts,
           num_slots,
           expert_slot_.data(),
           expert_key_.data(),
           slot_expert_.data(),
           slot_state_.data(),
           slot_generation_.data(),
           slot_key_.data(),
           slot_needed_.data(),
           slot_predicted_.data(),
           slot_unused_.data()};
}

void SlotTable::CopyAtRest(const SlotTableView& table) {
  const auto copy = [](auto& to, const auto* from) { std::copy_n(from, to.size(), to.begin()); };
  copy(expert_slot_, table.expert_slot);
  copy(expert_key_, table.expert_key);
  copy(slot_expert_, table.slot_expert);
  copy(slot_state_, table.slot_state);
  copy(slot_generation_, table.slot_generation);
  copy(slot_key_, table.slot_key);
  copy(slot_needed_, table.slot_needed);
  std::ranges::replace_if(slot_state_, InFlight, SlotState::kReady);
  std::ranges::fill(slot_predicted_, kNever);
  std::ranges::fill(slot_unused_, uint8_t{0});
}

}  // namespace expertflow
