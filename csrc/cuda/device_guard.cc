#include "cuda/device_guard.h"

#include <cuda_runtime_api.h>

#include "cuda/cuda_error.h"

namespace expertflow {

DeviceGuard::DeviceGuard(int device) {
  EXPERTFLOW_CUDA_CHECK(cudaGetDevice(&before_));
  if (device != before_) EXPERTFLOW_CUDA_CHECK(cudaSetDevice(device));
  changed_ = device != before_;
}

DeviceGuard::~DeviceGuard() {
  if (changed_) EXPERTFLOW_CUDA_WARN(cudaSetDevice(before_));
}

}  // namespace expertflow
