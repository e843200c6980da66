// Adaptive prefetching on a GPU: what the scheduler decides is tested without one, in
// cache_control_prefetch_test.cc; here, that it is measured and carried out.

#include <gtest/gtest.h>

#include <chrono>
#include <thread>
#include <vector>

#include "cuda_expert_cache_fixture.h"

namespace expertflow::cuda {
namespace {

class CudaPrefetchTest : public CudaExpertCacheTest {
 protected:
  // Needs of one layer ahead.
  int32_t PrefetchSurely(const std::vector<int64_t>& experts) {
    std::vector<float> need(kExperts);
    for (const int64_t expert : experts) need[static_cast<size_t>(expert)] = 1.0F;
    return cache_->PrefetchPredicted(need);
  }

  void AwaitPrefetched(int64_t num_bytes) const {
    while (Total().prefetch_bytes < num_bytes) {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
};

// Experts of a layer that no other token takes for a while: four of sixteen, in turn.
std::vector<int64_t> IdsOf(int64_t token) {
  const int64_t first = token % 4 * kTopK;
  return {first, first + 1, first + 2, first + 3};
}

class EveryPool : public CudaPrefetchTest, public testing::WithParamInterface<Pool> {};

INSTANTIATE_TEST_SUITE_P(Pools, EveryPool,
                         testing::Values(Pool::kPinned, Pool::kUnpinned, Pool::kFile));

TEST_P(EveryPool, WhatIsForeseenIsThereInTime) {
  MakeCache(GetParam(), Options(20));
  const auto run_token = [&](int64_t token, std::chrono::microseconds layer_time) {
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      const Plan& plan = Begin(layer, IdsOf(token));
      const int32_t num_predicted_layers = cache_->BeginPrefetch();  // may change the horizon
      EXPECT_GE(num_predicted_layers, cache_->horizon());
      const int64_t bytes_before = Total().prefetch_bytes;
      const int32_t num_posted = PrefetchSurely(IdsOf(layer + 1 < kLayers ? token : token + 1));
      EXPECT_TRUE(num_posted == 0 || cache_->horizon() > 0);
      AwaitPrefetched(bytes_before + num_posted * static_cast<int64_t>(kExpertBytes));
      Compute(plan);
      std::this_thread::sleep_for(layer_time);
    }
  };
  int64_t token = 0;
  // It pays, once that is known.
  while (token < 2000 && cache_->horizon() == 0) run_token(token++, std::chrono::milliseconds(1));
  ASSERT_GE(cache_->horizon(), 1);
  cache_->ResetStatistics();
  for (int64_t i = 0; i < 20; ++i) {
    run_token(token++, std::chrono::milliseconds(2));  // a layer outlasts its transfers
  }
  const PrefetchStatistics prefetched = cache_->prefetch_statistics();
  EXPECT_GT(prefetched.hits, 100);
  EXPECT_EQ(prefetched.hits, prefetched.used);
  cache_->ResetStatistics();
  EXPECT_EQ(cache_->prefetch_statistics().hits, 0);
  EXPECT_GE(cache_->horizon(), 1);
}

TEST_F(CudaPrefetchTest, APromptPrefetchesNothing) {
  MakeCache(Pool::kPinned, Options(20));
  cache_->SetHorizon(2);
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < 17 * kTopK; ++i) ids.push_back(i % kExperts);
  Compute(Begin(0, ids, 17));
  EXPECT_EQ(cache_->BeginPrefetch(), 0);
  EXPECT_EQ(PrefetchSurely({1, 2}), 0);
}

TEST_F(CudaPrefetchTest, WaitingForAPrefetchIsALateStallAndCounted) {
  source_->set_faults({.slow_percent = 100, .max_delay_us = 2000});
  MakeCache(Pool::kFile, Options(20, PolicyKind::kLru, 1));
  cache_->SetHorizon(1);
  Compute(Begin(0, IdsOf(0)));
  static_cast<void>(cache_->BeginPrefetch());
  EXPECT_EQ(PrefetchSurely(IdsOf(1)), kTopK);
  Compute(Begin(1, IdsOf(1)));
  const LayerStatistics layer = cache_->statistics()[1];
  EXPECT_EQ(layer.misses, 0);
  EXPECT_GT(layer.late_hits, 0);
  EXPECT_GT(layer.stall_us, 0.0);
  EXPECT_EQ(cache_->prefetch_statistics().used, kTopK);
}

TEST_F(CudaPrefetchTest, ACacheThatHoldsEverythingPrefetchesNothing) {
  MakeCache(Pool::kPinned, Options(kLayers * kExperts));
  for (int64_t token = 0; token < 3; ++token) {
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      Compute(Begin(layer, IdsOf(token)));
      static_cast<void>(cache_->BeginPrefetch());
      EXPECT_EQ(PrefetchSurely(IdsOf(token + 1)), 0);
    }
  }
}

}  // namespace
}  // namespace expertflow::cuda
