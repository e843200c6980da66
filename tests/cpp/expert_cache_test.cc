#include "host/expert_cache.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <latch>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "expert_cache_fixture.h"

namespace expertflow {
namespace {

using namespace std::chrono_literals;

TEST_F(ExpertCacheTest, RefusesOptionsThatDoNotFit) {
  EXPECT_THROW(MakeCache(Options(kNumLayers * kNumExperts + 1)), std::invalid_argument);
  EXPECT_THROW(MakeCache(Options(1)), std::invalid_argument);
  EXPECT_THROW(MakeCache(Options(4, 0)), std::invalid_argument);
  EXPECT_THROW(MakeCache(Options(4, -1)), std::invalid_argument);
  ExpertCacheOptions options = Options(4);
  options.chunk_bytes = 0;
  EXPECT_THROW(MakeCache(options), std::invalid_argument);
}

// It would be read past its end.
TEST_F(ExpertCacheTest, RefusesASourceOfAnotherModel) {
  source_ = std::make_shared<ScriptedSource>(size_t{kNumLayers * kNumExperts - 1}, kExpertBytes);
  EXPECT_THROW(MakeCache(Options(4)), std::invalid_argument);
  source_ = std::make_shared<ScriptedSource>(size_t{kNumLayers * kNumExperts}, kExpertBytes - 256);
  EXPECT_THROW(MakeCache(Options(4)), std::invalid_argument);
}

TEST_F(ExpertCacheTest, RefusesIdsThatTheModelLacks) {
  MakeCache(Options(4));
  EXPECT_THROW(Begin(0, {8}), std::out_of_range);
  EXPECT_THROW(Begin(2, {0}), std::out_of_range);
  EXPECT_THROW(Prefetch(1, {8}), std::out_of_range);
  EXPECT_THROW(Prefetch(1, {int64_t{1} << 32}), std::out_of_range) << "not to be cut to 32 bits";
  EXPECT_THROW(cache_->Wait(0), std::out_of_range) << "there is no plan";
  Compute(Begin(0, {1, 2}));
}

TEST_F(ExpertCacheTest, CountsWhatEveryLayerCost) {
  MakeCache(Options(6));
  Compute(Begin(0, {0, 1}));
  Compute(Begin(0, {1, 2}));
  Prefetch(1, {3});
  WaitUntil([&] { return Total().prefetch_bytes == int64_t{kExpertBytes}; });
  Compute(Begin(1, {3, 4}));
  const std::vector<LayerStatistics> layers = cache_->statistics();
  EXPECT_EQ(layers[0].hits, 1);
  EXPECT_EQ(layers[0].misses, 3);
  EXPECT_EQ(layers[0].demand_bytes, int64_t{3 * kExpertBytes});
  EXPECT_EQ(layers[1].hits, 1);
  EXPECT_EQ(layers[1].misses, 1);
  EXPECT_EQ(layers[1].demand_bytes, int64_t{kExpertBytes});
  EXPECT_EQ(layers[1].prefetch_bytes, int64_t{kExpertBytes});
  EXPECT_EQ(layers[1].wasted_prefetch_bytes, 0);
  EXPECT_EQ(Total().evictions, 0);
  EXPECT_GT(cache_->bandwidth_bytes_per_second(), 0.0);
  cache_->ResetStatistics();
  EXPECT_EQ(Total().misses + Total().demand_bytes, 0);
}

TEST_F(ExpertCacheTest, ResidentsAreInASlotOrOnTheirWay) {
  std::latch go(1);
  source_->set_hook([&](ExpertIndex, size_t) { go.wait(); });
  MakeCache(Options(2));
  Prefetch(1, {5});
  EXPECT_EQ(cache_->Residents(1), std::vector<uint8_t>({0, 0, 0, 0, 0, 1, 0, 0}));
  EXPECT_EQ(cache_->Residents(0), std::vector<uint8_t>(8, 0));
  go.count_down();
  Compute(Begin(1, {5, 1}));
  EXPECT_EQ(cache_->Residents(1), std::vector<uint8_t>({0, 1, 0, 0, 0, 1, 0, 0}));
  Compute(Begin(0, {2, 3}));
  EXPECT_EQ(cache_->Residents(0), std::vector<uint8_t>({0, 0, 1, 1, 0, 0, 0, 0}));
  EXPECT_EQ(cache_->Residents(1), std::vector<uint8_t>(8, 0)) << "evicted";
  EXPECT_THROW(cache_->Residents(2), std::out_of_range);
  EXPECT_THROW(cache_->Residents(-1), std::out_of_range);
}

TEST_F(ExpertCacheTest, APrefetchThatIsNeededMeanwhileIsALateHit) {
  std::latch needed(1);
  source_->set_hook([&](ExpertIndex, size_t) { needed.wait(); });
  MakeCache(Options(4));
  Prefetch(0, {5});
  const Plan& plan = Begin(0, {5});
  EXPECT_EQ(plan.rows[0].state, RowState::kLoading);
  needed.count_down();
  Compute(plan);
  EXPECT_EQ(Total().late_hits, 1);
  EXPECT_EQ(Total().demand_bytes + Total().prefetch_bytes, int64_t{kExpertBytes});
  EXPECT_EQ(Total().wasted_prefetch_bytes, 0);
}

TEST_F(ExpertCacheTest, ADemandOvertakesARunningPrefetch) {
  std::latch demand_posted(1);
  std::atomic<int> num_before{0};
  std::atomic<bool> demand_began{false};
  source_->set_hook([&](ExpertIndex expert, size_t) {
    if (expert == ExpertIndex{0}) demand_began = true;
    if (!demand_began) ++num_before;
    demand_posted.wait();
  });
  MakeCache(Options(4));
  Prefetch(1, {7});
  WaitUntil([&] { return num_before > 0; });
  const Plan& plan = Begin(0, {0});
  demand_posted.count_down();
  Compute(plan);
  EXPECT_LE(num_before, 2) << "of the 10 chunks of the prefetch";
  cache_.reset();  // ends the reads that use the hook
}

TEST_F(ExpertCacheTest, WaitDoesNotTakeOnASlowPrefetch) {
  std::latch row_is_ready(1);
  std::atomic<bool> demand_began{false};
  source_->set_hook([&](ExpertIndex expert, size_t) {
    if (expert != ExpertIndex{0}) return row_is_ready.wait();
    demand_began = true;
    std::this_thread::sleep_for(1ms);
  });
  ExpertCacheOptions options = Options(4);
  options.chunk_bytes = kExpertBytes;
  MakeCache(options);
  const Plan& plan = Begin(0, {0});
  WaitUntil([&] { return demand_began.load(); });
  Prefetch(1, {1});
  cache_->Wait(plan.num_hits);  // would never return from a read of the prefetch
  row_is_ready.count_down();
  cache_.reset();  // ends the reads that use the hook
}

TEST_F(ExpertCacheTest, AllWorkersShareOneTransfer) {
  std::latch all_read(3);
  source_->set_hook([&](ExpertIndex, size_t offset_bytes) {
    if (offset_bytes < 3 * kChunkBytes) all_read.arrive_and_wait();
  });
  MakeCache(Options(4, 3));
  Begin(0, {0});
  all_read.wait();  // the caller does not help: it never waits for the row
  cache_.reset();   // ends the reads that use the hook
}

TEST_F(ExpertCacheTest, ASlotThatWasNotReleasedOrIsNotReadyIsRefused) {
  MakeCache(Options(2));
  const Plan& plan = Begin(0, {0, 1, 2});
  ASSERT_EQ(plan.rows[0].next_row, 2);
  EXPECT_THROW(cache_->Wait(2), std::invalid_argument) << "row 0 has not been released";
  EXPECT_THROW(cache_->Release(2), std::invalid_argument);
  Compute(plan);
  std::latch released(1);
  source_->set_hook([&](ExpertIndex, size_t) { released.wait(); });
  Begin(0, {3, 4, 5});
  EXPECT_THROW(cache_->Release(0), std::invalid_argument) << "its transfer is running";
  released.count_down();
  cache_.reset();  // ends the reads that use the hook
}

TEST_F(ExpertCacheTest, ALayerThatFindsAllSlotsInFlightCancelsThem) {
  source_->set_faults({.slow_percent = 100, .max_delay_us = 20'000});
  MakeCache(Options(2));
  Prefetch(1, {0, 1});
  const Plan& plan = Begin(0, {2, 3});
  source_->set_faults({});
  Compute(plan);
  const LayerStatistics total = Total();
  EXPECT_LT(total.prefetch_bytes, int64_t{2 * kExpertBytes}) << "what was queued is not read";
  EXPECT_EQ(total.wasted_prefetch_bytes, total.prefetch_bytes);
  EXPECT_EQ(total.demand_bytes, int64_t{2 * kExpertBytes});
}

TEST_F(ExpertCacheTest, AnAbandonedLayerLeavesTheCacheUsable) {
  MakeCache(Options(2, 2));
  for (int64_t e = 0; e < 200; ++e) Begin(0, {e % 8, (e + 3) % 8, (e + 5) % 8});
  Compute(Begin(1, {0, 1, 2, 3}));
}

TEST_F(ExpertCacheTest, DestructionDoesNotWaitForQueuedTransfers) {
  source_->set_faults({.slow_percent = 100, .max_delay_us = 20'000});
  MakeCache(Options(kNumExperts));
  Prefetch(0, {0, 1, 2, 3, 4, 5, 6, 7});
  cache_.reset();
  EXPECT_LE(source_->num_reads(), 40) << "of 80 chunks";
}

}  // namespace
}  // namespace expertflow
