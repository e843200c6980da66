#pragma once

#include <cstdint>

#include "core/eviction/need_state.h"
#include "cuda/device_memory.h"

namespace expertflow {

// Owns the state of a need model in the memory of the device that is current when it is made, as it
// is before the first step.
class DeviceNeedState {
 public:
  // Throws OutOfDeviceMemory and CudaError.
  DeviceNeedState(int32_t num_layers, int32_t num_experts, int32_t top_k, int32_t num_slots);

  // Pointers to device memory.
  const BlockNeedState& view() const { return view_; }

 private:
  DeviceMemory memory_;
  BlockNeedState view_;
};

}  // namespace expertflow
