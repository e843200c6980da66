#include "host/ram_pool.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <latch>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "scripted_source.h"
#include "watchdog.h"

namespace expertflow {
namespace {

using namespace std::chrono_literals;
using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr size_t kNumExperts = 40;
constexpr size_t kExpertBytes = 5120;  // not a multiple of a page

class RamPoolTest : public testing::Test {
 protected:
  Watchdog watchdog_{"filling a pool", 60s};
  ExpertLayout layout_{{{"w", DType::kBFloat16, kExpertBytes / 2}}};
  std::shared_ptr<ScriptedSource> source_ =
      std::make_shared<ScriptedSource>(kNumExperts, kExpertBytes);
  std::shared_ptr<RamPool> pool_ = std::make_shared<RamPool>(layout_, kNumExperts);
};

TEST_F(RamPoolTest, ExpertsLieOnPagesAndReadBackInParts) {
  PoolFill(pool_, source_, 3).Join();
  EXPECT_EQ(pool_->num_bytes(), kNumExperts * 8192);
  for (int32_t e = 0; e < int32_t{kNumExperts}; ++e) {
    const std::byte* data = pool_->expert_data(ExpertIndex{e});
    EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % kPoolAlignment, 0U);
    EXPECT_TRUE(source_->Holds(data, ExpertIndex{e}));
    std::vector<std::byte> copy(kExpertBytes);
    pool_->Read(ExpertIndex{e}, 1024, std::span(copy).subspan(1024));
    pool_->Read(ExpertIndex{e}, 0, std::span(copy).first(1024));
    EXPECT_TRUE(source_->Holds(copy.data(), ExpertIndex{e}));
  }
}

TEST_F(RamPoolTest, FillReadsInParallelAndCountsBytes) {
  std::latch both_read(2);
  source_->set_hook([&](ExpertIndex expert, size_t) {
    if (Index(expert) < 2) both_read.arrive_and_wait();
  });
  PoolFill fill(pool_, source_, 2);
  EXPECT_EQ(fill.bytes_total(), kNumExperts * kExpertBytes);
  fill.Join();
  EXPECT_EQ(fill.bytes_done(), fill.bytes_total());
  EXPECT_EQ(source_->num_reads(), int64_t{kNumExperts}) << "every expert once";
}

TEST_F(RamPoolTest, WaitForTimesOutWhileReadersRun) {
  std::latch may_read(1);
  source_->set_hook([&](ExpertIndex, size_t) { may_read.wait(); });
  PoolFill fill(pool_, source_, 2);
  EXPECT_FALSE(fill.WaitFor(std::chrono::duration<double>(0.001)));
  EXPECT_EQ(fill.bytes_done(), 0U);
  may_read.count_down();
  EXPECT_TRUE(fill.WaitFor(std::chrono::duration<double>(60)));
  fill.Join();
}

TEST_F(RamPoolTest, CancelStopsAtTheNextExpert) {
  std::latch cancelled(1);
  source_->set_hook([&](ExpertIndex, size_t) { cancelled.wait(); });
  PoolFill fill(pool_, source_, 2);
  fill.Cancel();
  cancelled.count_down();
  EXPECT_THAT([&] { fill.Join(); }, ThrowsMessage<std::runtime_error>(HasSubstr("cancelled")));
  EXPECT_LE(fill.bytes_done(), 2 * kExpertBytes) << "each thread finishes one";
}

TEST_F(RamPoolTest, TheFirstErrorStopsAllThreadsAndReachesJoin) {
  source_->set_hook([&](ExpertIndex expert, size_t) {
    if (expert == ExpertIndex{5}) throw std::runtime_error("cannot read expert 5");
    std::this_thread::sleep_for(1ms);
  });
  PoolFill fill(pool_, source_, 2);
  EXPECT_TRUE(fill.WaitFor(std::chrono::duration<double>(60)));
  EXPECT_THAT([&] { fill.Join(); }, ThrowsMessage<std::runtime_error>("cannot read expert 5"));
  EXPECT_LT(fill.bytes_done(), fill.bytes_total());
  EXPECT_LE(source_->num_reads(), 20) << "not all of it";
}

TEST_F(RamPoolTest, DestructionCancels) {
  source_->set_faults({.slow_percent = 100, .max_delay_us = 20'000});
  {
    const PoolFill fill(pool_, source_, 2);
  }
  EXPECT_LE(source_->num_reads(), 10);
}

TEST_F(RamPoolTest, RefusesNoThreadsAndAnotherModelsSource) {
  EXPECT_THROW(PoolFill(pool_, source_, 0), std::invalid_argument);
  const auto fewer = std::make_shared<ScriptedSource>(kNumExperts - 1, kExpertBytes);
  EXPECT_THROW(PoolFill(pool_, fewer, 1), std::invalid_argument);
  const auto smaller = std::make_shared<ScriptedSource>(kNumExperts, kExpertBytes - 256);
  EXPECT_THROW(PoolFill(pool_, smaller, 1), std::invalid_argument);
}

TEST_F(RamPoolTest, RefusesMoreThanTheAddressSpaceHolds) {
  EXPECT_THROW(RamPool(layout_, size_t{1} << 50), std::bad_alloc);
}

}  // namespace
}  // namespace expertflow
