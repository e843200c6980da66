#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "cuda/event.h"

namespace expertflow {

// Measures on the device how long a stream waits for experts: an event before the wait and one
// after it. Not thread-safe.
class StallTimer {
 public:
  // Puts the wait for `arrival`, which was recorded, on `stream` and measures it.
  void Wait(const CudaEvent& arrival, cudaStream_t stream, int32_t layer);

  // Calls `add(layer, stall_us)` for every wait since the last call. Blocks until all have ended.
  void Collect(const std::function<void(int32_t layer, double stall_us)>& add);

 private:
  struct Interval {
    CudaEvent before{CudaEvent::Timing::kOn};
    CudaEvent after{CudaEvent::Timing::kOn};
    int32_t layer = 0;
  };

  std::vector<Interval> intervals_;
  size_t count_ = 0;  // of them in use; the others wait to be used again
};

}  // namespace expertflow
