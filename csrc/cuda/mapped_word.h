#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

namespace expertflow {

// Blocks until a kernel of `stream` has stored `value` to `word` in mapped host memory, and what it
// wrote before can be read. `what` it brings is for errors: CudaError if work on the stream failed,
// std::logic_error if the stream ended without it.
void AwaitWord(uint64_t& word, uint64_t value, cudaStream_t stream, std::string_view what);

}  // namespace expertflow
