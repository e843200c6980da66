#pragma once

#include <cuda_runtime_api.h>

#include "cuda/cuda_error.h"

namespace expertflow {

// Makes a device current in this thread for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    EXPERTFLOW_CUDA_CHECK(cudaGetDevice(&before_));
    if (device != before_) EXPERTFLOW_CUDA_CHECK(cudaSetDevice(device));
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) EXPERTFLOW_CUDA_WARN(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace expertflow
