#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "cuda/event.h"

namespace expertflow {

// Measures on the device how long a stream stands still for want of experts: an event after the
// work before the wait and one after the wait. Not thread-safe.
class StallTimer {
 public:
  // From here on `stream` has nothing to do for MoE layer `layer`, until End; `is_late`: it waits
  // for a prefetch.
  void Begin(cudaStream_t stream, int32_t layer, bool is_late);
  void End(cudaStream_t stream);

  // Calls `add` for every interval that is over on the device, in order, up to the first that is
  // not.
  void Collect(const std::function<void(int32_t layer, double stall_us, bool is_late)>& add);

  // Intervals from before are not counted.
  void Forget();

 private:
  static constexpr int32_t kForgotten = -1;
  struct Interval {
    CudaEvent before{CudaEvent::Timing::kOn};
    CudaEvent after{CudaEvent::Timing::kOn};
    int32_t layer = kForgotten;
    bool is_late = false;
  };

  std::vector<Interval> intervals_;
  size_t count_ = 0;  // of them in use; the others wait to be used again
};

}  // namespace expertflow
