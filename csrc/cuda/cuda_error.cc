#include "cuda/cuda_error.h"

#include <cstdio>

namespace expertflow {
namespace {

std::string Describe(cudaError_t code, std::string_view call, std::string_view file, int line,
                     std::string_view detail) {
  std::string text = std::string(cudaGetErrorName(code)) + " (" + cudaGetErrorString(code) + ")";
  text.append(" from ").append(call);
  if (!detail.empty()) text.append(", ").append(detail);
  return text.append(", at ").append(file).append(":").append(std::to_string(line));
}

}  // namespace

CudaError::CudaError(cudaError_t code, std::string_view call, std::string_view file, int line,
                     std::string_view detail)
    : std::runtime_error(Describe(code, call, file, line, detail)), code_(code) {}

void CheckCuda(cudaError_t code, std::string_view call, std::string_view file, int line,
               std::string_view detail) {
  if (code == cudaSuccess) return;
  cudaGetLastError();
  throw CudaError(code, call, file, line, detail);
}

void WarnCuda(cudaError_t code, std::string_view call, std::string_view file, int line) noexcept {
  if (code == cudaSuccess || code == cudaErrorCudartUnloading) return;
  cudaGetLastError();
  try {
    std::fprintf(stderr, "expertflow: warning: %s\n", Describe(code, call, file, line, {}).c_str());
  } catch (const std::bad_alloc&) {
    // No memory for the message: the failure that is being warned about is the smaller problem.
  }
}

}  // namespace expertflow
