// A small expert cache over a scripted source.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "host/expert_cache.h"
#include "scripted_source.h"
#include "watchdog.h"

namespace expertflow {

constexpr int32_t kNumLayers = 2;
constexpr int32_t kNumExperts = 8;
constexpr size_t kChunkBytes = 256;
constexpr size_t kExpertBytes = 10 * kChunkBytes;

inline ExpertLayout Layout() { return ExpertLayout({{"w", DType::kFloat32, kExpertBytes / 4}}); }

inline ExpertCacheOptions Options(int32_t num_slots, int32_t num_threads = 1) {
  return {.num_layers = kNumLayers,
          .num_experts = kNumExperts,
          .num_slots = num_slots,
          .planner = {.top_k = 2, .expert_bytes = kExpertBytes, .policy = PolicyKind::kLru},
          .chunk_bytes = kChunkBytes,
          .num_threads = num_threads};
}

class ExpertCacheTest : public testing::Test {
 protected:
  void MakeCache(const ExpertCacheOptions& options) {
    cache_ = std::make_unique<ExpertCache>(source_, Layout(), options);
  }

  const Plan& Begin(int32_t layer, std::vector<int64_t> ids) {
    return cache_->BeginLayer(layer, ids, 1);
  }

  void Prefetch(int32_t layer, std::vector<int64_t> ids) { cache_->Prefetch(layer, ids, 1); }

  // Waits for all rows and checks their bytes.
  void Compute(const Plan& plan) {
    for (int32_t r = 0; r < std::ssize(plan.rows); ++r) {
      const PlanRow row = plan.rows[static_cast<size_t>(r)];
      cache_->Wait(r);
      const ExpertIndex expert{plan.layer * kNumExperts + row.expert};
      EXPECT_TRUE(source_->Holds(cache_->slot_data(row.slot), expert)) << "row " << r;
      cache_->Release(r);
    }
  }

  LayerStatistics Total() const {
    LayerStatistics total;
    for (const LayerStatistics& layer : cache_->statistics()) total += layer;
    return total;
  }

  void WaitUntil(const std::function<bool()>& condition) {
    while (!condition()) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }

  Watchdog watchdog_{"the expert cache", std::chrono::seconds(60)};
  std::shared_ptr<ScriptedSource> source_ =
      std::make_shared<ScriptedSource>(size_t{kNumLayers * kNumExperts}, kExpertBytes);
  std::unique_ptr<ExpertCache> cache_;
};

}  // namespace expertflow
