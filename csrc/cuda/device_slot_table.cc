#include "cuda/device_slot_table.h"

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "cuda/cuda_error.h"

namespace expertflow {
namespace {

// Calls visit(array of a, array of b, bytes) for each array of two tables of the same shape.
template <class Visit>
void ForEachArray(SlotTableView& a, const SlotTableView& b, Visit&& visit) {
  const auto num_experts = static_cast<size_t>(b.num_layers) * static_cast<size_t>(b.num_experts);
  const auto num_slots = static_cast<size_t>(b.num_slots);
  const auto both = [&](auto*& in_a, auto* in_b, size_t count) {
    visit(in_a, in_b, count * sizeof *in_b);
  };
  both(a.expert_slot, b.expert_slot, num_experts);
  both(a.expert_key, b.expert_key, num_experts);
  both(a.slot_expert, b.slot_expert, num_slots);
  both(a.slot_state, b.slot_state, num_slots);
  both(a.slot_generation, b.slot_generation, num_slots);
  both(a.slot_key, b.slot_key, num_slots);
  both(a.slot_needed, b.slot_needed, num_slots);
  both(a.slot_predicted, b.slot_predicted, num_slots);
  both(a.slot_unused, b.slot_unused, num_slots);
}

void CheckSameShape(const SlotTableView& a, const SlotTableView& b) {
  if (a.num_layers == b.num_layers && a.num_experts == b.num_experts &&
      a.num_slots == b.num_slots) {
    return;
  }
  throw std::invalid_argument("slot tables of different shapes cannot be copied");
}

void CopyArrays(const SlotTableView& to, const SlotTableView& from) {
  CheckSameShape(to, from);
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
  SlotTableView target = to;
  ForEachArray(target, from, [](auto* in_target, const auto* source, size_t num_bytes) {
    EXPERTFLOW_CUDA_CHECK(cudaMemcpy(in_target, source, num_bytes, cudaMemcpyDefault));
  });
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
}

}  // namespace

DeviceSlotTable::DeviceSlotTable(int32_t num_layers, int32_t num_experts, int32_t num_slots) {
  constexpr size_t kAlignment = 256;
  const SlotTable empty(num_layers, num_experts, num_slots);
  view_ = empty.view();
  size_t num_bytes = 0;
  const auto aligned = [](size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  };
  ForEachArray(view_, empty.view(),
               [&](auto*, const auto*, size_t bytes) { num_bytes += aligned(bytes); });
  memory_ = DeviceMemory(num_bytes, "the slot table");
  std::byte* next = memory_.data();
  ForEachArray(view_, empty.view(), [&]<class T>(T*& array, const T*, size_t bytes) {
    array = reinterpret_cast<T*>(next);
    next += aligned(bytes);
  });
  CopyFrom(empty);
}

void DeviceSlotTable::CopyFrom(const SlotTable& table) { CopyArrays(view_, table.view()); }

void DeviceSlotTable::CopyTo(SlotTable& table) const { CopyArrays(table.view(), view_); }

}  // namespace expertflow
