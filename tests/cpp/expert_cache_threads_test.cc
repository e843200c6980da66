// Caches and threads: what ThreadSanitizer should see.

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "host/cache_registry.h"
#include "host/expert_cache.h"
#include "host/ram_pool.h"
#include "scripted_source.h"
#include "watchdog.h"

namespace expertflow {
namespace {

using namespace std::chrono_literals;

constexpr int32_t kNumLayers = 3;
constexpr int32_t kNumExperts = 16;
constexpr size_t kTotalExperts = size_t{kNumLayers * kNumExperts};
constexpr size_t kExpertBytes = 2048;

ExpertLayout Layout() { return ExpertLayout({{"w", DType::kFloat32, kExpertBytes / 4}}); }

ExpertCacheOptions Options(int32_t num_slots, PolicyKind policy = PolicyKind::kLru) {
  return {.num_layers = kNumLayers,
          .num_experts = kNumExperts,
          .num_slots = num_slots,
          .planner = {.top_k = 2, .expert_bytes = kExpertBytes, .policy = policy},
          .chunk_bytes = 512,
          .num_threads = 2};
}

// Computes random layers and returns how many rows held wrong bytes.
int RunLayers(ExpertCache& cache, const ScriptedSource& source, uint64_t seed, int num_layers) {
  std::mt19937_64 random(seed);
  const auto draw = [&](int32_t highest) {
    return std::uniform_int_distribution<int32_t>(0, highest)(random);
  };
  int num_wrong = 0;
  for (int i = 0; i < num_layers; ++i) {
    const int32_t layer = i % kNumLayers;
    const std::vector<int64_t> ids = {draw(kNumExperts - 1), draw(3), draw(3)};
    const Plan& plan = cache.BeginLayer(layer, ids, 1);
    cache.Prefetch((layer + 1) % kNumLayers, std::vector<int64_t>{draw(kNumExperts - 1)}, 1);
    for (int32_t r = 0; r < std::ssize(plan.rows); ++r) {
      const PlanRow row = plan.rows[static_cast<size_t>(r)];
      cache.Wait(r);
      const ExpertIndex expert{layer * kNumExperts + row.expert};
      if (!source.Holds(cache.slot_data(row.slot), expert)) ++num_wrong;
      cache.Release(r);
    }
  }
  return num_wrong;
}

TEST(ExpertCacheThreadsTest, TwoCachesShareASource) {
  const Watchdog watchdog("two caches", 120s);
  const auto source = std::make_shared<ScriptedSource>(kTotalExperts, kExpertBytes);
  source->set_faults({.slow_percent = 10, .max_delay_us = 50});
  std::atomic<int> num_wrong{0};
  std::vector<std::thread> threads;
  for (const uint64_t seed : {1U, 2U}) {
    threads.emplace_back([&, seed] {
      ExpertCache cache(source, Layout(), Options(seed == 1 ? 2 : 20));
      num_wrong += RunLayers(cache, *source, seed, 500);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_wrong, 0);
}

TEST(ExpertCacheThreadsTest, StatisticsAreReadWhileLayersRun) {
  const Watchdog watchdog("the reader of statistics", 120s);
  const auto source = std::make_shared<ScriptedSource>(kTotalExperts, kExpertBytes);
  ExpertCache cache(source, Layout(), Options(8));
  std::atomic<bool> done{false};
  std::thread reader([&] {
    int64_t last = 0;
    while (!done) {
      LayerStatistics total;
      for (const LayerStatistics& layer : cache.statistics()) total += layer;
      EXPECT_GE(total.hits + total.late_hits + total.misses, last);
      EXPECT_GE(cache.bandwidth_bytes_per_second(), 0.0);
      last = total.hits + total.late_hits + total.misses;
      std::this_thread::yield();
    }
    cache.ResetStatistics();
  });
  EXPECT_EQ(RunLayers(cache, *source, 5, 1000), 0);
  done = true;
  reader.join();
}

TEST(ExpertCacheThreadsTest, ACacheMayBeDrivenByAnotherThreadForEveryLayer) {
  const Watchdog watchdog("a cache that changes hands", 120s);
  const auto source = std::make_shared<ScriptedSource>(kTotalExperts, kExpertBytes);
  ExpertCache cache(source, Layout(), Options(6));
  for (uint64_t i = 0; i < 20; ++i) {
    std::thread([&] { EXPECT_EQ(RunLayers(cache, *source, i, 10), 0); }).join();
  }
}

std::shared_ptr<RamPool> FilledPool(const std::shared_ptr<ScriptedSource>& source) {
  const auto pool = std::make_shared<RamPool>(Layout(), kTotalExperts);
  PoolFill(pool, source, 2).Join();
  return pool;
}

TEST(AliasedCacheTest, TheWholeModelInRamIsNeverCopied) {
  const auto source = std::make_shared<ScriptedSource>(kTotalExperts, kExpertBytes);
  const std::shared_ptr<RamPool> pool = FilledPool(source);
  for (const PolicyKind policy :
       {PolicyKind::kLru, PolicyKind::kDecayedFrequency, PolicyKind::kTwoLevelLru}) {
    for (const CacheScope scope : {CacheScope::kGlobal, CacheScope::kLayer}) {
      ExpertCacheOptions options = Options(static_cast<int32_t>(kTotalExperts), policy);
      options.planner.scope = scope;
      ExpertCache cache(pool, Layout(), options);
      EXPECT_EQ(RunLayers(cache, *source, 3, 50), 0);
      const Plan& plan = cache.BeginLayer(2, std::vector<int64_t>{7}, 1);
      EXPECT_EQ(cache.slot_data(plan.rows[0].slot),
                pool->expert_data(ExpertIndex{2 * kNumExperts + 7}));
      LayerStatistics total;
      for (const LayerStatistics& layer : cache.statistics()) total += layer;
      EXPECT_EQ(total.misses + total.late_hits + total.evictions, 0);
      EXPECT_EQ(total.demand_bytes + total.prefetch_bytes, 0);
      EXPECT_EQ(total.stall_us, 0.0);
    }
  }
}

TEST(AliasedCacheTest, OnDemandCopiesAlsoIfAllWouldFit) {
  const auto source = std::make_shared<ScriptedSource>(kTotalExperts, kExpertBytes);
  const std::shared_ptr<RamPool> pool = FilledPool(source);
  ExpertCache cache(pool, Layout(),
                    Options(static_cast<int32_t>(kTotalExperts), PolicyKind::kOnDemand));
  EXPECT_EQ(RunLayers(cache, *source, 3, 30), 0);
  EXPECT_GT(cache.statistics()[0].misses, 0);
}

TEST(CacheRegistryTest, AHandleFindsItsCacheUntilThatIsClosed) {
  const auto source = std::make_shared<ScriptedSource>(kTotalExperts, kExpertBytes);
  auto cache = std::make_shared<ExpertCache>(source, Layout(), Options(8));
  const int64_t handle = RegisterCache(Backend::kHost, cache);
  EXPECT_EQ(FindCache(handle).backend, Backend::kHost);
  EXPECT_EQ(FindCache(handle).cache, cache);
  EXPECT_THROW(FindCache(handle + 1), std::invalid_argument);
  cache.reset();
  EXPECT_THROW(FindCache(handle), std::invalid_argument) << "destroyed, still registered";
  UnregisterCache(handle);
  EXPECT_THROW(FindCache(handle), std::invalid_argument);
}

}  // namespace
}  // namespace expertflow
