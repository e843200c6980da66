#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "cuda/cuda_error.h"

namespace expertflow {

// Device memory for a test; its calls wait for the whole device.
class DeviceBuffer {
 public:
  // Every byte is 0xFF: NaN in each dtype, so that what a kernel should have written shows.
  explicit DeviceBuffer(size_t num_bytes) : num_bytes_(num_bytes) {
    void* data;
    EXPERTFLOW_CUDA_CHECK(cudaMalloc(&data, num_bytes));
    data_.reset(static_cast<std::byte*>(data));
    Poison();
  }
  explicit DeviceBuffer(const std::vector<std::byte>& bytes) : DeviceBuffer(bytes.size()) {
    EXPERTFLOW_CUDA_CHECK(
        cudaMemcpy(data_.get(), bytes.data(), num_bytes_, cudaMemcpyHostToDevice));
  }

  std::byte* data() const { return data_.get(); }

  void Poison() {
    EXPERTFLOW_CUDA_CHECK(cudaMemset(data_.get(), 0xFF, num_bytes_));
    EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
  }

  std::vector<std::byte> Read() const {
    std::vector<std::byte> bytes(num_bytes_);
    EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
    EXPERTFLOW_CUDA_CHECK(
        cudaMemcpy(bytes.data(), data_.get(), num_bytes_, cudaMemcpyDeviceToHost));
    return bytes;
  }

 private:
  struct Free {
    void operator()(std::byte* data) const { EXPERTFLOW_CUDA_WARN(cudaFree(data)); }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t num_bytes_;
};

}  // namespace expertflow
