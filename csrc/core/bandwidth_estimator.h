#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace expertflow {

// Bytes per second of a link, exponentially weighted by the bytes moved. Only time in which the
// link was busy counts: copies that overlap share it.
class BandwidthEstimator {
 public:
  // Half of the weight lies on the last `half_life_bytes`.
  explicit BandwidthEstimator(double half_life_bytes = 64.0 * 1024 * 1024)
      : half_life_bytes_(half_life_bytes) {}

  // A copy that began and ended at these times (any origin).
  void Record(size_t bytes, double begin_us, double end_us) {
    const double busy_us = end_us - std::max(begin_us, last_end_us_);
    last_end_us_ = std::max(last_end_us_, end_us);
    pending_bytes_ += static_cast<double>(bytes);
    pending_us_ += std::max(busy_us, 0.0);
    if (pending_us_ <= 0.0) return;
    const double keep = std::exp2(-pending_bytes_ / half_life_bytes_);
    weighted_bytes_ = keep * weighted_bytes_ + pending_bytes_;
    weighted_us_ = keep * weighted_us_ + pending_us_;
    pending_bytes_ = pending_us_ = 0.0;
  }

  // 0 before the first copy.
  double bytes_per_second() const {
    return weighted_us_ > 0.0 ? weighted_bytes_ / weighted_us_ * 1e6 : 0.0;
  }

 private:
  double half_life_bytes_;
  double last_end_us_ = -1e300;
  double pending_bytes_ = 0.0;
  double pending_us_ = 0.0;
  double weighted_bytes_ = 0.0;
  double weighted_us_ = 0.0;
};

}  // namespace expertflow
