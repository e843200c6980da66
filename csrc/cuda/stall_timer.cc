#include "cuda/stall_timer.h"

namespace expertflow {

void StallTimer::Begin(cudaStream_t stream, int32_t layer) {
  if (count_ == intervals_.size()) intervals_.emplace_back();
  intervals_[count_].layer = layer;
  intervals_[count_].before.Record(stream);
}

void StallTimer::End(cudaStream_t stream) { intervals_[count_++].after.Record(stream); }

void StallTimer::Collect(const std::function<void(int32_t layer, double stall_us)>& add) {
  for (size_t i = 0; i < count_; ++i) {
    const Interval& interval = intervals_[i];
    interval.after.Synchronize();
    add(interval.layer, interval.after.ElapsedUs(interval.before));
  }
  count_ = 0;
}

}  // namespace expertflow
