// Adaptive prefetching with threads that copy and a clock that runs.

#include <gtest/gtest.h>

#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "core/prefetcher.h"
#include "expert_cache_fixture.h"

namespace expertflow {
namespace {

class ExpertCachePrefetchTest : public ExpertCacheTest {
 protected:
  // Layers with an expert each that was foreseen one layer ahead and is never resident by itself;
  // `visit` gets the layer's number and how many prefetches it posted.
  template <class Visit>
  void RunForeseen(int64_t num_layers, std::chrono::microseconds layer_time, const Visit& visit) {
    for (int64_t i = 0; i < num_layers; ++i) {
      const int64_t other = 2 + i % 6;
      const Plan& plan = Begin(static_cast<int32_t>(i % kNumLayers), {0, other});
      static_cast<void>(cache_->BeginPrefetch());
      const int64_t bytes_before = Total().prefetch_bytes;
      const int32_t num_posted = PrefetchSurely({0, 2 + static_cast<int32_t>(other - 1) % 6});
      WaitUntil([&] {
        return Total().prefetch_bytes >= bytes_before + num_posted * int64_t{kExpertBytes};
      });
      Compute(plan);
      std::this_thread::sleep_for(layer_time);
      if (!visit(i, num_posted)) return;
    }
  }

  // Needs of one layer ahead.
  int32_t PrefetchSurely(const std::vector<int32_t>& experts) {
    std::vector<float> need(kNumExperts);
    for (const int32_t expert : experts) need[static_cast<size_t>(expert)] = 1.0F;
    return cache_->PrefetchPredicted(need);
  }
};

TEST_F(ExpertCachePrefetchTest, WhatIsForeseenIsThereInTime) {
  MakeCache(Options(6));
  constexpr int64_t kLayers = 18;
  // It pays, once that is known; until then nothing is posted.
  int64_t num_posted = 0;
  RunForeseen(20000, std::chrono::microseconds(200), [&](int64_t, int32_t posted) {
    num_posted += posted;
    return cache_->horizon() == 0;
  });
  ASSERT_GT(cache_->horizon(), 0);
  EXPECT_LE(num_posted, 2) << "the last layer's";
  cache_->ResetStatistics();
  RunForeseen(kLayers, std::chrono::milliseconds(3), [&](int64_t layer, int32_t posted) {
    EXPECT_TRUE(posted > 0 || layer < 6) << "layer " << layer;  // some are still there
    return true;
  });
  const PrefetchStatistics prefetched = cache_->prefetch_statistics();
  EXPECT_GE(prefetched.hits, kLayers - 6);
  EXPECT_EQ(prefetched.hits, prefetched.used);
  EXPECT_GE(cache_->horizon(), 1);  // more where a copy was held up
}

// While a thread copies, minds change: what waits is taken back, and never is a byte wrong.
TEST_F(ExpertCachePrefetchTest, WhatIsForeseenBetterTakesThePlaceOfWhatWaits) {
  MakeCache(Options(6));
  constexpr std::chrono::microseconds kLayerTime(200);
  RunForeseen(20000, kLayerTime, [&](int64_t, int32_t) { return cache_->horizon() == 0; });
  ASSERT_GT(cache_->horizon(), 0);
  int64_t num_taken_back = 0;
  for (int64_t i = 0; i < 20000 && num_taken_back < 50; ++i) {
    const auto layer = static_cast<int32_t>(i % kNumLayers);
    const int32_t next_layer = (layer + 1) % kNumLayers;
    const auto other = [](int64_t token) { return 2 + static_cast<int32_t>(token % 6); };
    const Plan& plan = Begin(layer, {0, other(i)});
    static_cast<void>(cache_->BeginPrefetch());
    PrefetchSurely({0, other(i + 2), other(i + 3), other(i + 4)});
    const std::vector<uint8_t> before = cache_->Residents(next_layer);
    PrefetchSurely({0, other(i + 1)});
    const std::vector<uint8_t> after = cache_->Residents(next_layer);
    for (size_t e = 0; e < before.size(); ++e) num_taken_back += before[e] > after[e];
    Compute(plan);
    std::this_thread::sleep_for(kLayerTime);
  }
  EXPECT_GE(num_taken_back, 50);
}

TEST_F(ExpertCachePrefetchTest, ACacheThatHoldsEverythingPrefetchesNothing) {
  MakeCache(Options(kNumLayers * kNumExperts));
  for (int32_t step = 0; step < 6; ++step) {
    for (int32_t e = 0; e < kNumExperts; ++e) Compute(Begin(step % kNumLayers, {e}));
    static_cast<void>(cache_->BeginPrefetch());
    if (step >= kNumLayers) {
      EXPECT_EQ(PrefetchSurely({1, 2, 3}), 0);
    }
  }
}

TEST_F(ExpertCachePrefetchTest, AFixedHorizonNeedsNoMeasurement) {
  MakeCache(Options(8));
  cache_->SetHorizon(1);
  const Plan& plan = Begin(0, {0, 1});
  EXPECT_EQ(cache_->BeginPrefetch(), 1);
  EXPECT_EQ(PrefetchSurely({5, 6}), 2);
  Compute(plan);
  Compute(Begin(1, {5, 6}));
  EXPECT_EQ(cache_->prefetch_statistics().used, 2);
  EXPECT_THROW(cache_->SetHorizon(Prefetcher::kMaxHorizon + 1), std::invalid_argument);
}

TEST_F(ExpertCachePrefetchTest, WaitingForAPrefetchIsALateStall) {
  source_->set_faults({.slow_percent = 100, .max_delay_us = 2000});
  MakeCache(Options(8));
  cache_->SetHorizon(1);
  const Plan& plan = Begin(0, {0, 1});
  static_cast<void>(cache_->BeginPrefetch());
  EXPECT_EQ(PrefetchSurely({5}), 1);
  Compute(plan);
  Compute(Begin(1, {5}));
  const LayerStatistics layer = cache_->statistics()[1];
  EXPECT_EQ(layer.hits + layer.late_hits, 1);
  EXPECT_EQ(cache_->prefetch_statistics().hits, layer.hits);
  EXPECT_EQ(layer.late_hits > 0, layer.stall_us > 0.0);
}

}  // namespace
}  // namespace expertflow
