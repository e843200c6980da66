#pragma once

#include <cuda_runtime_api.h>

namespace expertflow {

// One block that does nothing: what a launch costs at least.
void LaunchEmptyKernel(cudaStream_t stream);

}  // namespace expertflow
