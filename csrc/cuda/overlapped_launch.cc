#include "cuda/overlapped_launch.h"

#include <string>

#include "cuda/cuda_error.h"

namespace expertflow {
namespace {

std::string Describe(const KernelLaunch& launch) {
  return std::to_string(launch.num_blocks.x) + " x " + std::to_string(launch.num_blocks.y) +
         " blocks of " + std::to_string(launch.num_threads) + " threads and " +
         std::to_string(launch.shared_bytes) + " bytes of shared memory";
}

}  // namespace

bool CanOverlap(const void* kernel) {
  cudaFuncAttributes attributes;
  EXPERTFLOW_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
}

void LaunchOverlapped(const KernelLaunch& launch, void** arguments, cudaStream_t stream) {
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.num_blocks;
  config.blockDim = launch.num_threads;
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = launch.overlaps_previous ? 1 : 0;
  const cudaError_t code = cudaLaunchKernelExC(&config, launch.kernel, arguments);
  if (code != cudaSuccess) {  // the text costs host time
    CheckCuda(code, "cudaLaunchKernelExC", __FILE__, __LINE__, Describe(launch));
  }
}

}  // namespace expertflow
