#include "core/shadow_cache.h"

#include <gtest/gtest.h>

#include <optional>
#include <vector>

#include "core/simulator.h"
#include "trace_fixture.h"

namespace expertflow {
namespace {

constexpr int32_t kLayers = 3;
constexpr int32_t kExperts = 8;
constexpr int32_t kTopK = 2;
constexpr size_t kExpertBytes = 4096;
// Half of a layer's 100 us is its experts'; a transfer takes 40 us.
constexpr LayerObservation kMeasured{.compute_us = 100.0, .bytes_per_second = kExpertBytes / 40e-6};

PlannerConfig Config() { return {.top_k = kTopK, .expert_bytes = kExpertBytes}; }

class ShadowCacheTest : public testing::Test {
 protected:
  void MakeShadow(bool prefetches, int32_t num_slots) {
    table_.emplace(kLayers, kExperts, num_slots);
    planner_.emplace(*table_, Config());
    queue_.emplace(num_slots, kExpertBytes, 2);
    shadow_.emplace(table_->view(), *planner_, *queue_, Config(), prefetches);
    shadow_->Restart();
    tick_ = 0;
  }

  // The next layer; returns the stall of the one before.
  double RunLayer(const std::vector<int64_t>& experts) {
    const auto layer = static_cast<int32_t>(tick_ % kLayers);
    return shadow_->BeginLayer(layer, ++tick_, experts, kMeasured);
  }

  std::optional<SlotTable> table_;  // of the real cache, which plans nothing here
  std::optional<Planner> planner_;
  std::optional<TransferQueue> queue_;
  std::optional<ShadowCache> shadow_;
  Tick tick_ = 0;
};

TEST_F(ShadowCacheTest, WaitsForMissesWhileResidentsCompute) {
  MakeShadow(/*prefetches=*/false, kLayers * kExperts);
  EXPECT_EQ(RunLayer({0, 1}), 0.0) << "nothing was before";
  // The first is waited for, and computes for 25 us of the 40 that the second takes.
  EXPECT_DOUBLE_EQ(RunLayer({0, 1}), 40.0 + 15.0);
  EXPECT_DOUBLE_EQ(RunLayer({0, 1}), 55.0);
  EXPECT_DOUBLE_EQ(RunLayer({0, 2}), 55.0) << "that of layer 2";
  EXPECT_DOUBLE_EQ(RunLayer({0, 1}), 15.0) << "0 is resident and computes first";
  EXPECT_DOUBLE_EQ(RunLayer({0, 1}), 0.0);
}

TEST_F(ShadowCacheTest, ExpertsThatTakeAllOfALayerHideMore) {
  MakeShadow(/*prefetches=*/false, kLayers * kExperts);
  shadow_->set_experts_share(1.0);
  RunLayer({0, 1});
  EXPECT_DOUBLE_EQ(RunLayer({0, 1}), 40.0) << "the first computes for 50 us";
}

TEST_F(ShadowCacheTest, PrefetchesWhatIsForeseenIfItPrefetches) {
  for (const bool prefetches : {false, true}) {
    MakeShadow(prefetches, kLayers * kExperts);
    RunLayer({0, 1});
    RunLayer({0, 1});
    std::vector<Prediction> sure = {{1, 2, 1.0F}};
    if (prefetches) shadow_->Prefetch(sure);
    RunLayer({2, 2});
    const double stall_us = RunLayer({0, 1});
    // It is copied behind the 80 us of what was missed, while the layer takes 155.
    EXPECT_DOUBLE_EQ(stall_us, prefetches ? 0.0 : 40.0);
  }
}

TEST_F(ShadowCacheTest, FirstLayersOfATokenHaveTheTimeUntilTheirPlan) {
  for (const double until_plan_us : {10.0, 60.0}) {
    MakeShadow(/*prefetches=*/true, kLayers * kExperts);
    for (int layer = 0; layer < kLayers; ++layer) RunLayer({0, 1});
    shadow_->BeginToken(until_plan_us);
    shadow_->PrefetchNeeded(std::vector{0.0F, 0.0F, 0.0F, 0.0F, 0.0F, 1.0F, 0.0F, 0.0F});
    RunLayer({5, 5});
    // What is certain is worth its slot however little of it is hidden.
    EXPECT_DOUBLE_EQ(RunLayer({0, 1}), until_plan_us > 40.0 ? 0.0 : 40.0 - until_plan_us);
  }
}

TEST_F(ShadowCacheTest, StartsFromWhatTheRealOneHoldsAndLeavesThatAlone) {
  MakeShadow(/*prefetches=*/true, kTopK);
  const std::vector<int64_t> routed = {3, 4};
  const Plan* plan = planner_->PlanLayer(0, routed, 1, 1);
  ASSERT_NE(plan, nullptr);
  shadow_->Restart();  // their transfers are on the way; in the shadow they are there
  EXPECT_DOUBLE_EQ(RunLayer({3, 4}), 0.0);
  EXPECT_DOUBLE_EQ(RunLayer({5, 6}), 0.0);
  EXPECT_DOUBLE_EQ(RunLayer({5, 6}), 55.0);
  for (const int32_t expert : {3, 4}) {
    EXPECT_NE(table_->view().expert_slot[expert], SlotId::kNone);
  }
}

// Where nothing is prefetched, it is the simulator, layer by layer.
TEST_F(ShadowCacheTest, StallsAsLongAsTheSimulator) {
  constexpr int32_t kSlots = 10;
  const TestTrace trace = SkewedTrace(500, kLayers, kTopK, kExperts, /*seed=*/3);
  Simulator simulator(trace.view(),
                      {.num_slots = kSlots,
                       .expert_bytes = kExpertBytes,
                       .policy = Config().policy,
                       .horizon = 0,
                       .link = {.bytes_per_second = kMeasured.bytes_per_second, .latency_ns = 0},
                       .chunk_bytes = kExpertBytes,
                       .layer_time_ns = 100'000});
  const int64_t simulated_ns = simulator.RunAll().stall_ns;
  MakeShadow(/*prefetches=*/false, kSlots);
  double stall_us = 0.0;
  for (int64_t step = 0; step < trace.view().num_steps(); ++step) {
    const auto routed = trace.view().experts(step);
    stall_us += RunLayer({routed.begin(), routed.end()});
  }
  stall_us += RunLayer({0, 1});
  EXPECT_GT(simulated_ns, 0);
  EXPECT_NEAR(stall_us, static_cast<double>(simulated_ns) * 1e-3, 1e-6 * stall_us);
}

}  // namespace
}  // namespace expertflow
