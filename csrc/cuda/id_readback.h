#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "cuda/pinned_memory.h"

namespace expertflow {

// Brings routed expert ids from the device to the host: a kernel stores them in mapped memory and
// the host polls a word there, which takes 8 us with the launch where a copy and a synchronization
// take 10.
class IdReadback {
 public:
  // On the device that is current.
  IdReadback();

  // Blocks until everything on `stream` so far is done, and returns the `count` ids at
  // `device_ids`, valid until the next call. Throws CudaError if the work on the stream failed.
  std::span<const int64_t> Read(const int64_t* device_ids, size_t count, cudaStream_t stream);

 private:
  void Reserve(size_t count);

  std::optional<PinnedMemory> memory_;  // a word that counts the reads, then the ids
  size_t capacity_ = 0;                 // ids
  uint64_t num_reads_ = 0;
};

}  // namespace expertflow
