#include "cuda/overlapped_launch.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/cuda_error.h"

namespace expertflow {
namespace {

std::string Describe(const KernelLaunch& launch) {
  return std::to_string(launch.num_blocks.x) + " x " + std::to_string(launch.num_blocks.y) +
         " blocks of " + std::to_string(launch.num_threads) + " threads and " +
         std::to_string(launch.shared_bytes) + " bytes of shared memory";
}

size_t NumDevices() {
  int num_devices;
  EXPERTFLOW_CUDA_CHECK(cudaGetDeviceCount(&num_devices));
  return static_cast<size_t>(num_devices);
}

// Whether the code that the current device runs is compiled for compute capability 9.0 or up. Code
// for an older one has no instruction to wait for the kernel before it, so it must not start early,
// whatever the device could do. All kernels are compiled for the same architectures, so the first
// one that is launched on a device answers for all.
bool CanOverlap(const void* kernel) {
  enum class Answer : uint8_t { kUnknown, kNo, kYes };
  static std::vector<std::atomic<Answer>> answers(NumDevices());
  int device;
  EXPERTFLOW_CUDA_CHECK(cudaGetDevice(&device));
  std::atomic<Answer>& answer = answers[static_cast<size_t>(device)];
  if (answer == Answer::kUnknown) {
    cudaFuncAttributes attributes;
    EXPERTFLOW_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    answer = attributes.ptxVersion >= 90 ? Answer::kYes : Answer::kNo;
  }
  return answer == Answer::kYes;
}

}  // namespace

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
  config.numAttrs = launch.may_start_early && CanOverlap(launch.kernel) ? 1 : 0;
  const cudaError_t code = cudaLaunchKernelExC(&config, launch.kernel, arguments);
  if (code != cudaSuccess) {  // the text costs host time
    CheckCuda(code, "cudaLaunchKernelExC", __FILE__, __LINE__, Describe(launch));
  }
}

}  // namespace expertflow
