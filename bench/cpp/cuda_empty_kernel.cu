#include "cuda/cuda_error.h"
#include "cuda_empty_kernel.h"

namespace expertflow {
namespace {

__global__ void EmptyKernel() {}

}  // namespace

void LaunchEmptyKernel(cudaStream_t stream) {
  EmptyKernel<<<1, 32, 0, stream>>>();
  EXPERTFLOW_CUDA_CHECK(cudaGetLastError());
}

}  // namespace expertflow
