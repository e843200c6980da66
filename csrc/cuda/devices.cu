#include <cuda_runtime_api.h>

#include "cuda/cuda_error.h"
#include "cuda/devices.h"

namespace expertflow {

GpuList ListGpus() {
  int num_gpus = 0;
  const cudaError_t code = cudaGetDeviceCount(&num_gpus);
  if (code != cudaSuccess) {
    cudaGetLastError();
    int driver_version = 0;
    if (cudaDriverGetVersion(&driver_version) == cudaSuccess && driver_version == 0) {
      return {.gpus = {}, .missing_reason = "no NVIDIA driver is installed"};
    }
    return {.gpus = {}, .missing_reason = cudaGetErrorString(code)};
  }
  if (num_gpus == 0) return {.gpus = {}, .missing_reason = "no CUDA-capable device is detected"};
  GpuList list;
  for (int device = 0; device < num_gpus; ++device) {
    cudaDeviceProp properties;
    EXPERTFLOW_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    int numa_node = -1;
#if CUDART_VERSION >= 12090
    EXPERTFLOW_CUDA_CHECK(cudaDeviceGetAttribute(&numa_node, cudaDevAttrHostNumaId, device));
#endif
    list.gpus.push_back({.name = properties.name,
                         .compute_capability_major = properties.major,
                         .compute_capability_minor = properties.minor,
                         .total_memory_bytes = properties.totalGlobalMem,
                         .numa_node = numa_node});
  }
  return list;
}

}  // namespace expertflow
