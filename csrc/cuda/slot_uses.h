#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/ids.h"
#include "cuda/event.h"

namespace expertflow::cuda {

// What work last read each slot, so that no copy overwrites it before. The caller serialises the
// calls, but for MakeWait.
class SlotUses {
 public:
  // A point in the work of some stream, which stands until 64 others are recorded; from then on for
  // a later one.
  using Use = size_t;

  // On the device that is current.
  explicit SlotUses(int32_t num_slots);

  // What was enqueued on `stream` so far. A slot that is `Set` to it was last read before.
  Use Record(cudaStream_t stream);
  void Set(SlotId slot, Use use) { of_slot_[static_cast<size_t>(Index(slot))] = use; }
  Use Of(SlotId slot) const { return of_slot_[static_cast<size_t>(Index(slot))]; }

  // What is enqueued on `stream` from now on comes after the use. From any thread.
  void MakeWait(Use use, cudaStream_t stream) const { uses_[use].event.MakeWait(stream); }

 private:
  struct Point {
    CudaEvent event;
    cudaStream_t stream = nullptr;
  };

  std::vector<Point> uses_;  // a ring
  std::vector<Use> of_slot_;
  size_t next_ = 0;
};

}  // namespace expertflow::cuda
