#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

namespace expertflow::cuda {

// Enqueues on `stream` a copy of a few values to `to`, in device memory. They travel as arguments
// of a kernel: a copy would wait in the copy engine behind the experts that are on their way.
// `values` may be freed at once. Throws CudaError.
void Upload(std::span<const int32_t> values, int32_t* to, cudaStream_t stream);

}  // namespace expertflow::cuda
