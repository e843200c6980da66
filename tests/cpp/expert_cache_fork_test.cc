// A forked child has the cache's memory but not its threads: every call must throw, and neither
// destroying the cache nor leaving the process may wait for threads that are not there.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/expert_cache.h"
#include "scripted_source.h"
#include "watchdog.h"

// A child that leaves would look for leaks, and hangs if a thread that was just starting in the
// parent held a lock of the sanitizer's own.
extern "C" const char* __lsan_default_options() { return "detect_leaks=0"; }

namespace expertflow {
namespace {

using namespace std::chrono_literals;

constexpr size_t kExpertBytes = 1024;

class ExpertCacheForkTest : public testing::Test {
 protected:
  ExpertCacheForkTest() {
    const ExpertLayout layout({{"w", DType::kFloat32, kExpertBytes / 4}});
    cache_ = std::make_unique<ExpertCache>(
        source_, layout,
        ExpertCacheOptions{.num_layers = 1,
                           .num_experts = 8,
                           .num_slots = 4,
                           .planner = {.top_k = 2, .expert_bytes = kExpertBytes},
                           .chunk_bytes = 256,
                           .num_threads = 3});
  }

  // Runs `child` in a forked process and returns how that ended: its exit status, or -1.
  static int StatusOfChild(const std::function<int()>& child) {
    const pid_t pid = fork();
    if (pid == 0) {
      alarm(30);  // kills a child that hangs
      _exit(child());
    }
    int status = 0;
    EXPECT_EQ(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

  static bool IsRefused(const std::function<void()>& call) {
    try {
      call();
    } catch (const std::logic_error& e) {
      return std::string(e.what()).find("fork") != std::string::npos;
    }
    return false;
  }

  std::vector<int64_t> ids_ = {0, 1, 2};
  std::shared_ptr<ScriptedSource> source_ = std::make_shared<ScriptedSource>(8U, kExpertBytes);
  std::unique_ptr<ExpertCache> cache_;
};

TEST_F(ExpertCacheForkTest, EveryCallThrowsInTheChild) {
  source_->set_faults({.slow_percent = 100, .max_delay_us = 10'000});
  cache_->BeginLayer(0, ids_, 1);  // and fork with transfers in flight
  const int status = StatusOfChild([this] {
    if (!IsRefused([this] { cache_->Wait(0); })) return 1;
    if (!IsRefused([this] { cache_->BeginLayer(0, ids_, 1); })) return 2;
    if (!IsRefused([this] { cache_->Prefetch(0, ids_, 1); })) return 3;
    if (!IsRefused([this] { cache_->Release(0); })) return 4;
    if (!IsRefused([this] { cache_->statistics(); })) return 5;
    if (!IsRefused([this] { cache_->ResetStatistics(); })) return 6;
    return 0;
  });
  EXPECT_EQ(status, 0);
  source_->set_faults({});
  for (int32_t r = 0; r < 3; ++r) cache_->Wait(r);  // the parent goes on
}

TEST_F(ExpertCacheForkTest, DestructionInTheChildDoesNotHang) {
  cache_->BeginLayer(0, ids_, 1);
  for (int32_t r = 0; r < 3; ++r) cache_->Wait(r);
  EXPECT_EQ(StatusOfChild([this] {
              cache_.reset();
              return 0;
            }),
            0);
}

TEST_F(ExpertCacheForkTest, LeavingTheChildDoesNotHang) {
  EXPECT_EQ(StatusOfChild([]() -> int { std::exit(0); }), 0);
}

}  // namespace
}  // namespace expertflow
