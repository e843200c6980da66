// Ends a test that hangs.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>

namespace expertflow {

// Aborts the program with a message unless it is destroyed in time.
class Watchdog {
 public:
  Watchdog(std::string what, std::chrono::seconds limit)
      : thread_([this, what = std::move(what), limit] {
          std::unique_lock lock(mutex_);
          if (is_over_.wait_for(lock, limit, [this] { return over_; })) return;
          std::fprintf(stderr, "watchdog: %s hangs\n", what.c_str());
          std::abort();
        }) {}

  ~Watchdog() {
    {
      const std::scoped_lock lock(mutex_);
      over_ = true;
    }
    is_over_.notify_one();
    thread_.join();
  }

  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

 private:
  std::mutex mutex_;
  std::condition_variable is_over_;
  bool over_ = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace expertflow
