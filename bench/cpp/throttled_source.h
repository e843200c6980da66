// A source of experts behind a link of a given speed: one copy after the other, each as long as the
// link profile says. No bytes are read; the time is what counts.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <thread>

#include "core/expert_source.h"
#include "core/simulation/virtual_transfers.h"

namespace expertflow {

using Clock = std::chrono::steady_clock;

// Sleeps most of it and spins the rest, because a sleep oversleeps by some 50 us.
inline void WaitUntil(Clock::time_point when) {
  std::this_thread::sleep_until(when - std::chrono::microseconds(100));
  while (Clock::now() < when) {
  }
}

class ThrottledSource : public ExpertSource {
 public:
  ThrottledSource(size_t num_experts, size_t expert_bytes, const LinkProfile& link)
      : num_experts_(num_experts), expert_bytes_(expert_bytes), link_(link) {}

  size_t num_experts() const override { return num_experts_; }
  size_t expert_bytes() const override { return expert_bytes_; }

  void Read(ExpertIndex, size_t, std::span<std::byte> to) const override {
    const auto ns = static_cast<double>(to.size()) * 1e9 / link_.bytes_per_second;
    const std::chrono::nanoseconds duration(link_.latency_ns + static_cast<int64_t>(ns));
    Clock::time_point end;
    {
      const std::lock_guard lock(mutex_);
      end = free_at_ = std::max(free_at_, Clock::now()) + duration;
    }
    WaitUntil(end);
  }

 private:
  size_t num_experts_;
  size_t expert_bytes_;
  LinkProfile link_;
  mutable std::mutex mutex_;
  mutable Clock::time_point free_at_;  // when the copies reserved so far end
};

}  // namespace expertflow
