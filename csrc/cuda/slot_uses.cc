#include "cuda/slot_uses.h"

namespace expertflow::cuda {
namespace {

constexpr size_t kNumUses = 64;

}  // namespace

SlotUses::SlotUses(int32_t num_slots)
    : uses_(kNumUses), of_slot_(static_cast<size_t>(num_slots), 0) {}

SlotUses::Use SlotUses::Record(cudaStream_t stream) {
  const size_t index = next_++ % kNumUses;
  Point& use = uses_[index];
  // Slots may still refer to what the event stood for: it comes before what it stands for now.
  if (use.stream != stream) use.event.MakeWait(stream);
  use.event.Record(stream);
  use.stream = stream;
  return index;
}

}  // namespace expertflow::cuda
