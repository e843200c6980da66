#include "cuda/host_registration.h"

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/cuda_error.h"

namespace expertflow {

HostRegistration::HostRegistration(std::span<std::byte> memory) {
  EXPERTFLOW_CUDA_CHECK(cudaHostRegister(memory.data(), memory.size(),
                                         cudaHostRegisterPortable | cudaHostRegisterMapped),
                        std::to_string(memory.size()) + " bytes");
  data_.reset(memory.data());
}

void HostRegistration::Unregister::operator()(std::byte* data) const {
  EXPERTFLOW_CUDA_WARN(cudaHostUnregister(data));
}

}  // namespace expertflow
