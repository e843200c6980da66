#include "cuda/stall_timer.h"

#include <algorithm>

namespace expertflow {

void StallTimer::Begin(cudaStream_t stream, int32_t layer, bool is_late) {
  if (count_ == intervals_.size()) intervals_.emplace_back();
  intervals_[count_].layer = layer;
  intervals_[count_].is_late = is_late;
  intervals_[count_].before.Record(stream);
}

void StallTimer::End(cudaStream_t stream) { intervals_[count_++].after.Record(stream); }

void StallTimer::Collect(
    const std::function<void(int32_t layer, double stall_us, bool is_late)>& add) {
  size_t num_over = 0;
  while (num_over < count_ && intervals_[num_over].after.IsDone()) {
    const Interval& interval = intervals_[num_over++];
    if (interval.layer != kForgotten) {
      add(interval.layer, interval.after.ElapsedUs(interval.before), interval.is_late);
    }
  }
  const auto first = intervals_.begin();
  std::rotate(first, first + static_cast<ptrdiff_t>(num_over),
              first + static_cast<ptrdiff_t>(count_));
  count_ -= num_over;
}

void StallTimer::Forget() {
  for (size_t i = 0; i < count_; ++i) intervals_[i].layer = kForgotten;
}

}  // namespace expertflow
