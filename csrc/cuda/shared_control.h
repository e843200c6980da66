#pragma once

#include <cstdint>
#include <mutex>

#include "core/bandwidth_estimator.h"
#include "core/cache_control.h"

namespace expertflow::cuda {

// What an expert cache decides, and the lock that guards it: between the thread that drives the
// cache, those that copy, and those that read statistics.
struct SharedControl {
  using Lock = std::unique_lock<std::mutex>;

  SharedControl(const ExpertCacheOptions& options, int32_t max_chunks_in_flight)
      : control(options, max_chunks_in_flight) {}

  // Locks without sleeping: the lock is held for a few microseconds at most, and to be woken up
  // takes ten times as long.
  Lock Acquire() const;

  mutable std::mutex mutex;  // guards the two below
  CacheControl control;
  BandwidthEstimator bandwidth;
};

// Leaves the core to its other hyperthread for a moment, but not to the scheduler.
void Pause();

double NowUs();

}  // namespace expertflow::cuda
