#pragma once

#include <cstddef>
#include <cstdint>

#include "core/slot_table.h"
#include "cuda/device_memory.h"

namespace expertflow {

// Owns the arrays of a slot table in the memory of the device that is current when it is made. All
// slots start empty.
class DeviceSlotTable {
 public:
  // Throws std::invalid_argument as SlotTable does, OutOfDeviceMemory, and CudaError.
  DeviceSlotTable(int32_t num_layers, int32_t num_experts, int32_t num_slots);

  // Pointers to device memory.
  const SlotTableView& view() const { return view_; }

  // The whole of a table in host memory of the same shape, else std::invalid_argument is thrown.
  // Both wait for all work of the device, so they are for setting up and for tests.
  void CopyFrom(const SlotTable& table);
  void CopyTo(SlotTable& table) const;

 private:
  DeviceMemory memory_;
  SlotTableView view_;
};

}  // namespace expertflow
