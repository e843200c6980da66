#include "cuda/device_memory.h"

#include <cuda_runtime_api.h>

#include "cuda/cuda_error.h"

namespace expertflow {

DeviceMemory::DeviceMemory(size_t num_bytes, const std::string& purpose) : num_bytes_(num_bytes) {
  void* data = nullptr;
  const cudaError_t code = cudaMalloc(&data, num_bytes);
  if (code == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    EXPERTFLOW_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    throw OutOfDeviceMemory(purpose + " needs " + std::to_string(num_bytes) +
                            " bytes of device memory, and " + std::to_string(free_bytes) + " of " +
                            std::to_string(total_bytes) + " are free");
  }
  CheckCuda(code, "cudaMalloc", __FILE__, __LINE__, std::to_string(num_bytes) + " bytes");
  data_.reset(static_cast<std::byte*>(data));
}

void DeviceMemory::Free::operator()(std::byte* data) const { EXPERTFLOW_CUDA_WARN(cudaFree(data)); }

}  // namespace expertflow
