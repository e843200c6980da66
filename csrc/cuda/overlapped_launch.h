#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace expertflow {

struct KernelLaunch {
  const void* kernel;
  dim3 num_blocks;
  unsigned num_threads;
  size_t shared_bytes;
  bool may_start_early = true;  // else it starts once all has ended that the stream waits for
};

// Enqueues a kernel with the addresses of its arguments. It may start before the one ahead of it in
// the stream has ended, see grid_dependency.h, where its code can wait for that. Throws CudaError
// if it cannot be launched.
void LaunchOverlapped(const KernelLaunch& launch, void** arguments, cudaStream_t stream);

}  // namespace expertflow
