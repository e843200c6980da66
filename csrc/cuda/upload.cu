#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "cuda/cuda_error.h"
#include "cuda/upload.h"

namespace expertflow::cuda {
namespace {

constexpr size_t kMaxValues = 960;  // of a launch: its arguments are at most 4 KiB

struct Values {
  int32_t value[kMaxValues];
};

__global__ void Store(const __grid_constant__ Values values, int count, int32_t* to) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    to[i] = values.value[i];
  }
}

}  // namespace

void Upload(std::span<const int32_t> values, int32_t* to, cudaStream_t stream) {
  for (; !values.empty(); values = values.subspan(std::min(values.size(), kMaxValues))) {
    const size_t count = std::min(values.size(), kMaxValues);
    Values arguments;
    std::ranges::copy(values.first(count), arguments.value);
    Store<<<1, 256, 0, stream>>>(arguments, static_cast<int>(count), to);
    EXPERTFLOW_CUDA_CHECK(cudaGetLastError(), std::to_string(count) + " values");
    to += count;
  }
}

}  // namespace expertflow::cuda
