#include "cuda/pinned_memory.h"

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/cuda_error.h"

namespace expertflow {

PinnedMemory::PinnedMemory(size_t num_bytes) : num_bytes_(num_bytes) {
  void* data = nullptr;
  EXPERTFLOW_CUDA_CHECK(
      cudaHostAlloc(&data, num_bytes, cudaHostAllocPortable | cudaHostAllocMapped),
      std::to_string(num_bytes) + " bytes");
  data_.reset(static_cast<std::byte*>(data));
}

void PinnedMemory::Free::operator()(std::byte* data) const {
  EXPERTFLOW_CUDA_WARN(cudaFreeHost(data));
}

}  // namespace expertflow
