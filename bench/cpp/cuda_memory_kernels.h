#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace expertflow {

// Reads `num_bytes` once and keeps next to nothing: the rate at which memory can be read.
void LaunchReadAll(const void* data, size_t num_bytes, unsigned* sink, cudaStream_t stream);

// Fills with bfloat16 values between -scale and scale, all different enough.
void LaunchFillRandom(void* data, size_t num_bytes, float scale, cudaStream_t stream);

}  // namespace expertflow
