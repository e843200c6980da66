#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace expertflow {

struct KernelLaunch {
  const void* kernel;
  dim3 num_blocks;
  unsigned num_threads;
  size_t shared_bytes;
  bool overlaps_previous;  // see grid_dependency.h; only if CanOverlap(kernel)
};

// Whether the code that the current device runs for `kernel` is compiled for compute capability 9.0
// or up. Code for an older one has no instruction to wait for the kernel before it, so it must
// not start early, whatever the device could do.
bool CanOverlap(const void* kernel);

// Enqueues a kernel with the addresses of its arguments. Throws CudaError if it cannot be launched.
void LaunchOverlapped(const KernelLaunch& launch, void** arguments, cudaStream_t stream);

}  // namespace expertflow
