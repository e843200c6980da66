#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/async_copy.h"
#include "cuda/expert_mlp/params.h"
#include "cuda/grid_dependency.h"

namespace expertflow::mlp {

struct WeightPair {
  uint4 first;
  uint4 second;
};

template <class Layout>
constexpr size_t kRingBytes = size_t{Layout::kDepth} * 2 * Layout::kThreads * 16;

// A thread's share of the weights, in the order it uses them, through its own part of a ring in
// shared memory: up to Layout::kDepth steps of two 16-byte chunks are under way at any time, also
// across the end of a unit, which a load into registers would not give at this register count. At 1
// token, 90 to 96 KiB in flight on each multiprocessor cover the latency of HBM at its full rate
// (4.4 TB/s · 0.9 µs / 132 = 30 KiB) with room for waiting; more only makes the first weights wait
// for others' last. No other thread touches this thread's part, so it needs no barrier.
//
// The work of a kernel is a list of units: `Layout::num_units()` for each pass, pass after pass.
// The thread takes units first_unit, first_unit + unit_stride, ...
template <class Layout>
class WeightStream {
 public:
  __device__ WeightStream(const Params& params, const Layout& layout, uint4* ring, int first_unit,
                          int unit_stride)
      : params_(params),
        layout_(layout),
        ring_(ring + threadIdx.x),
        unit_(first_unit),
        unit_stride_(unit_stride),
        num_units_(params.num_passes * layout.num_units()) {
    StartUnit();
  }

  // Loads the first weights, then waits for the kernel before, whose results may be read
  // afterwards. The next kernel may start from here on, not earlier, and so it finds ended all but
  // this one.
  __device__ void Start() {
    for (int i = 0; i < kDepth; ++i) StartStep();
    WaitForPrerequisites();
    LetDependentsStart();
  }

  // The next step's weights; what the layout says is not there has no defined value.
  __device__ WeightPair Take() {
    AwaitCopies<kDepth - 1>();
    const uint4* slot = ring_ + slot_ * kSlotChunks;
    const WeightPair weights{slot[0], slot[kThreads]};
    StartStep();
    return weights;
  }

 private:
  static constexpr int kThreads = Layout::kThreads;
  static constexpr int kDepth = Layout::kDepth;
  static constexpr int kSlotChunks = 2 * kThreads;

  __device__ void StartUnit() {
    step_ = 0;
    if (unit_ >= num_units_) return;
    const Pass& pass = params_.passes[unit_ / layout_.num_units()];
    next_ = layout_.UnitStart(
        params_.weights + static_cast<size_t>(pass.slot) * params_.slot_stride_bytes,
        unit_ % layout_.num_units());
  }

  __device__ void NextStep() {
    next_ += layout_.step_bytes();
    if (++step_ < layout_.num_steps()) return;
    unit_ += unit_stride_;
    StartUnit();
  }

  // Loads into the slot that was taken last (or, first, into each). A group is committed also when
  // there is nothing left to load, so that the count of groups stays the count of steps.
  __device__ void StartStep() {
    if (unit_ < num_units_) {
      uint4* slot = ring_ + slot_ * kSlotChunks;
      if (layout_.Has(step_)) {
        Copy(slot, next_);
        Copy(slot + kThreads, next_ + layout_.second_bytes());
      }
      NextStep();
    }
    CommitCopies();
    slot_ = slot_ + 1 == kDepth ? 0 : slot_ + 1;
  }

  __device__ static void Copy(uint4* shared, const std::byte* global) {
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(global)
                 : "memory");
  }

  const Params& params_;
  const Layout& layout_;
  uint4* ring_;
  const std::byte* next_ = nullptr;
  int slot_ = 0;
  int step_ = 0;
  int unit_;
  int unit_stride_;
  int num_units_;
};

}  // namespace expertflow::mlp
