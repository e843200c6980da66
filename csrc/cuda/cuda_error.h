#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <string_view>

namespace expertflow {

// A call of the CUDA runtime failed. The message has the error, the call, where it stands, and what
// sizes were asked for.
class CudaError : public std::runtime_error {
 public:
  CudaError(cudaError_t code, std::string_view call, std::string_view file, int line,
            std::string_view detail);

  cudaError_t code() const { return code_; }

 private:
  cudaError_t code_;
};

// Throws CudaError unless `code` is cudaSuccess. Takes a non-sticky error off the runtime, so that
// the next check does not find it again.
void CheckCuda(cudaError_t code, std::string_view call, std::string_view file, int line,
               std::string_view detail = {});

// For destructors: prints to stderr instead of throwing, and nothing when the driver is already
// unloading, since then the process ends and its resources with it.
void WarnCuda(cudaError_t code, std::string_view call, std::string_view file, int line) noexcept;

}  // namespace expertflow

// EXPERTFLOW_CUDA_CHECK(call) or EXPERTFLOW_CUDA_CHECK(call, detail), the detail naming sizes.
// After a kernel launch the call is cudaGetLastError().
#define EXPERTFLOW_CUDA_CHECK(call, ...) \
  ::expertflow::CheckCuda((call), #call, __FILE__, __LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define EXPERTFLOW_CUDA_WARN(call) ::expertflow::WarnCuda((call), #call, __FILE__, __LINE__)
