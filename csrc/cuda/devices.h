#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace expertflow {

struct GpuInfo {
  std::string name;
  int compute_capability_major;
  int compute_capability_minor;
  size_t total_memory_bytes;
  int numa_node;  // of the host, where memory is nearest; -1 if not known
};

struct GpuList {
  std::vector<GpuInfo> gpus;
  std::string missing_reason;  // why there are none; empty if there are
};

// The GPUs this process can use. Does not throw for want of a driver or a device, and sets up no
// context on a device.
GpuList ListGpus();

}  // namespace expertflow
