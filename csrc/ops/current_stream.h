#pragma once

#include <cuda_runtime_api.h>

namespace expertflow::ops {

// The stream that torch computes on in this thread. Throws std::runtime_error if the torch that
// runs has no CUDA.
cudaStream_t CurrentStream(int device);

}  // namespace expertflow::ops
