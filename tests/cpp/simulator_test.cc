// The times are computed by hand: a chunk takes its 512 bytes at 1 byte/ns and 10 ns of latency.

#include "core/simulator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <set>
#include <stdexcept>
#include <tuple>

#include "trace_fixture.h"

namespace expertflow {
namespace {

constexpr LinkProfile kLink{.bytes_per_second = 1e9, .latency_ns = 10};
constexpr LinkProfile kInfiniteLink{.bytes_per_second = std::numeric_limits<double>::infinity(),
                                    .latency_ns = 0};

SimulatorConfig TinyConfig(int32_t num_slots, int64_t layer_time_ns) {
  return {.num_slots = num_slots,
          .expert_bytes = 1024,  // two chunks: 1044 ns
          .policy = PolicyKind::kLru,
          .horizon = 0,
          .link = kLink,
          .chunk_bytes = 512,
          .layer_time_ns = layer_time_ns};
}

// Two tokens, two layers, one expert each.
TestTrace TinyTrace() { return {2, 1, 4, {0, 1, 0, 2}}; }

SimulationResult Simulate(const TestTrace& trace, const SimulatorConfig& config) {
  return Simulator(trace.view(), config).RunAll();
}

auto Fields(const SimulationResult& r) {
  return std::tuple(r.num_tokens, r.counts.hits, r.prefetch_hits, r.counts.late_hits,
                    r.counts.misses, r.counts.evictions, r.counts.demand_bytes,
                    r.counts.prefetch_bytes, r.counts.wasted_prefetch_bytes, r.stall_ns,
                    r.late_stall_ns, r.horizon_sum);
}

TEST(SimulatorTest, DemandStallsForTheWholeTransfer) {
  const SimulationResult result = Simulate(TinyTrace(), TinyConfig(2, 1000));
  EXPECT_EQ(result.counts.hits, 1);
  EXPECT_EQ(result.counts.misses, 3);
  EXPECT_EQ(result.stall_ns, 3 * 1044);
  EXPECT_EQ(result.counts.demand_bytes, 3 * 1024);
}

TEST(SimulatorTest, PrefetchHidesTheComputeTimeUntilItsLayer) {
  SimulatorConfig config = TinyConfig(2, 1000);
  config.predictor = PredictorKind::kOracle;
  config.horizon = 1;
  const SimulationResult result = Simulate(TinyTrace(), config);
  // Both prefetches have 1000 ns between two routers, and miss 44 of 1044.
  EXPECT_EQ(result.stall_ns, 1044 + 44 + 44);
  EXPECT_EQ(result.late_stall_ns, 44 + 44);
  EXPECT_EQ(result.counts.late_hits, 2);
  EXPECT_EQ(result.counts.hits, 1);
  EXPECT_EQ(result.counts.misses, 1);
}

TEST(SimulatorTest, CopiesUnderWaySlowComputationDown) {
  SimulatorConfig config = TinyConfig(2, 1000);
  config.predictor = PredictorKind::kOracle;
  config.horizon = 1;
  config.copy_slowdown = 0.02;  // the 1000 ns between two routers become 1020
  EXPECT_EQ(Simulate(TinyTrace(), config).stall_ns, 1044 + 24 + 24);
  config.copy_slowdown = 0.05;
  const SimulationResult result = Simulate(TinyTrace(), config);
  EXPECT_EQ(result.stall_ns, 1044);
  EXPECT_EQ(result.prefetch_hits, 2);
  config.predictor = PredictorKind::kNone;
  EXPECT_EQ(Simulate(TinyTrace(), config).stall_ns, 3 * 1044) << "it slows nothing that waits";
}

TEST(SimulatorTest, WhatAMissTakesBeforeItIsAwaitedHidesPartOfIt) {
  SimulatorConfig config = TinyConfig(2, 1000);
  config.miss_time_ns = 30;
  EXPECT_EQ(Simulate(TinyTrace(), config).stall_ns, 3 * (1044 - 30));
  config.predictor = PredictorKind::kOracle;
  config.horizon = 1;
  EXPECT_EQ(Simulate(TinyTrace(), config).stall_ns, 1014 + 14 + 14) << "late by 44 ns without it";
}

TEST(SimulatorTest, PrefetchInTimeIsAPrefetchHit) {
  SimulatorConfig config = TinyConfig(2, 1200);
  config.predictor = PredictorKind::kOracle;
  config.horizon = 1;
  const SimulationResult result = Simulate(TinyTrace(), config);
  EXPECT_EQ(result.stall_ns, 1044);
  EXPECT_EQ(result.prefetch_hits, 2);
  EXPECT_EQ(result.counts.hits, 3);  // these, and one of an expert that stayed
  EXPECT_EQ(result.counts.late_hits, 0);
  EXPECT_EQ(result.counts.prefetch_bytes, 2 * 1024);
}

TEST(SimulatorTest, FirstLayerIsForeseenWhenItsTokenBegins) {
  // One layer, two tokens, an expert each: half a layer's time of 1200 ns passes before its plan.
  TestTrace trace{1, 1, 4, {0, 1}, 1, 1, {0, 0}, {0, 0}, {0, 1}, {65535, 65535}};
  SimulatorConfig config = TinyConfig(2, 1200);
  config.predictor = PredictorKind::kRecorded;
  config.horizon = 1;
  const SimulationResult result = Simulate(trace, config);
  EXPECT_EQ(result.stall_ns, 2 * (1044 - 600));
  EXPECT_EQ(result.late_stall_ns, result.stall_ns);
  EXPECT_EQ(result.counts.late_hits, 2);
  EXPECT_EQ(result.horizon_sum, 2) << "counted once a layer";
  trace.first_predicted_ids.clear();
  EXPECT_EQ(Simulate(trace, config).stall_ns, 2 * 1044);
}

TEST(SimulatorTest, DemandWaitsForTwoChunksOfAPrefetchAtMost) {
  // Layer 1 is foreseen to need expert 3 but needs 1. Four chunks an expert, 522 ns each: expert 0
  // arrives at 2588, then two of the prefetch's chunks are in flight until 4154, and the demand,
  // posted at 3588, ends at 4154 + 2088.
  const TestTrace trace{2, 1, 4, {0, 1}, 1, 1, {3, 0}, {65535, 0}};
  SimulatorConfig config = TinyConfig(3, 1000);
  config.expert_bytes = 2048;
  config.predictor = PredictorKind::kRecorded;
  config.horizon = 1;
  const SimulationResult result = Simulate(trace, config);
  EXPECT_EQ(result.stall_ns, 2088 + (6242 - 3588));
  EXPECT_EQ(result.counts.misses, 2);
}

TEST(SimulatorTest, ResidentExpertsComputeWhileAMissArrives) {
  // Token 1 needs expert 0, which is there, and 2: half of the experts' 2000 ns pass meanwhile.
  const TestTrace trace{1, 2, 4, {0, 1, 0, 2}};
  SimulatorConfig config = TinyConfig(3, 2000);
  config.expert_share = 1.0;
  config.warmup_tokens = 1;
  EXPECT_EQ(Simulate(trace, config).stall_ns, 1044 - 1000);
  config.expert_share = 0.0;
  EXPECT_EQ(Simulate(trace, config).stall_ns, 1044);
}

TEST(SimulatorTest, CountsTheGoldenTraceAsThePlannerAlone) {
  // The trace and the counts of golden_trace_test.cc.
  TestTrace trace{2, 2, 8, {}};
  uint32_t state = 1;
  const auto draw = [&state] { return (state = state * 1664525U + 1013904223U) >> 16; };
  for (int64_t step = 0; step < 600; ++step) {
    const size_t first = trace.expert_ids.size();
    while (trace.expert_ids.size() < first + 2) {
      const uint32_t r = draw();
      const auto expert = static_cast<uint16_t>(
          r % 4 == 0 ? (r >> 2) % 8 : (r >> 2) % 3 + static_cast<uint32_t>(step % 2));
      if (trace.expert_ids.size() == first || trace.expert_ids[first] != expert) {
        trace.expert_ids.push_back(expert);
      }
    }
  }
  const SimulationResult lru = Simulate(trace, TinyConfig(6, 1000));
  EXPECT_EQ(std::tuple(lru.counts.hits, lru.counts.misses, lru.counts.evictions),
            std::tuple(714, 486, 480));
  SimulatorConfig config = TinyConfig(6, 1000);
  config.policy = PolicyKind::kOnDemand;
  const SimulationResult on_demand = Simulate(trace, config);
  EXPECT_EQ(on_demand.counts.misses, 1200);
  EXPECT_EQ(on_demand.counts.demand_bytes, 1200 * 1024);
}

TEST(SimulatorTest, RepeatsToTheNanosecond) {
  const TestTrace trace = SkewedTrace(200, 4, 2, 16, 3);
  SimulatorConfig config = TinyConfig(24, 700);
  config.predictor = PredictorKind::kIds;
  config.horizon = SimulatorConfig::kAutoHorizon;
  EXPECT_EQ(Fields(Simulate(trace, config)), Fields(Simulate(trace, config)));
}

TEST(SimulatorTest, LeavesTheWarmUpOut) {
  const TestTrace trace = SkewedTrace(100, 3, 2, 16, 5);
  SimulatorConfig config = TinyConfig(20, 700);
  const SimulationResult whole = Simulate(trace, config);
  config.warmup_tokens = 40;
  const SimulationResult rest = Simulate(trace, config);
  EXPECT_EQ(rest.num_tokens, 60);
  EXPECT_EQ(rest.counts.hits + rest.counts.misses, 60 * 3 * 2);
  EXPECT_LT(rest.stall_ns, whole.stall_ns);
  config.warmup_tokens = 100;
  EXPECT_THROW(Simulate(trace, config), std::invalid_argument);
}

TEST(SimulatorTest, TakesTransfersBackWhenTheyHoldEverySlot) {
  // Two slots, and predictions that fill both with what layer 1 does not need.
  const TestTrace trace{2,
                        1,
                        8,
                        {0, 1, 0, 1, 0, 1},
                        1,
                        2,
                        {5, 6, 0, 0, 5, 6, 0, 0, 5, 6, 0, 0},
                        {65535, 60000, 0, 0, 65535, 60000, 0, 0, 65535, 60000, 0, 0}};
  SimulatorConfig config = TinyConfig(1, 100);
  config.predictor = PredictorKind::kRecorded;
  config.horizon = 1;
  const SimulationResult result = Simulate(trace, config);
  EXPECT_EQ(result.counts.hits + result.counts.late_hits + result.counts.misses, 6);
}

TEST(SimulatorTest, RefusesWhatDoesNotFit) {
  const TestTrace trace = TinyTrace();
  SimulatorConfig config = TinyConfig(2, 1000);
  config.horizon = Simulator::kMaxHorizon + 1;
  EXPECT_THROW(Simulate(trace, config), std::invalid_argument);
  config = TinyConfig(2, -1);
  EXPECT_THROW(Simulate(trace, config), std::invalid_argument);
  config = TinyConfig(2, 1000);
  config.miss_time_ns = -1;
  EXPECT_THROW(Simulate(trace, config), std::invalid_argument);
  config.miss_time_ns = 0;
  config.copy_slowdown = -0.1;
  EXPECT_THROW(Simulate(trace, config), std::invalid_argument);
  config = TinyConfig(2, 1000);
  config.predictor = PredictorKind::kRecorded;
  EXPECT_THROW(Simulate(trace, config), std::invalid_argument);
  config = TinyConfig(2, 1000);
  config.link.bytes_per_second = 0.0;
  EXPECT_THROW(Simulate(trace, config), std::invalid_argument);
  const TestTrace wrong{2, 1, 4, {0, 1, 0, 4}};
  EXPECT_THAT([&] { Simulate(wrong, TinyConfig(2, 1000)); },
              testing::ThrowsMessage<std::invalid_argument>(
                  testing::HasSubstr("token 1, layer 1, position 0 is 4")));
}

struct Case {
  PolicyKind policy;
  CacheScope scope;
  int64_t layer_time_ns;
};

class SimulatorPropertyTest : public testing::TestWithParam<Case> {
 protected:
  SimulatorConfig Config() const {
    SimulatorConfig config = TinyConfig(48, GetParam().layer_time_ns);
    config.policy = GetParam().policy;
    config.scope = GetParam().scope;
    config.horizon = SimulatorConfig::kAutoHorizon;
    config.warmup_tokens = 100;
    return config;
  }
  TestTrace trace_ = SkewedTrace(1500, 6, 2, 32, 11);
};

TEST_P(SimulatorPropertyTest, NothingStallsOnAnInfiniteLink) {
  SimulatorConfig config = Config();
  config.link = kInfiniteLink;
  for (const auto kind : {PredictorKind::kNone, PredictorKind::kOracle}) {
    config.predictor = kind;
    EXPECT_EQ(Simulate(trace_, config).stall_ns, 0);
  }
}

TEST_P(SimulatorPropertyTest, AdaptivePrefetchIsNotWorseThanNone) {
  SimulatorConfig config = Config();
  const int64_t none_ns = Simulate(trace_, config).stall_ns;
  ASSERT_GT(none_ns, 0);
  for (const auto kind : {PredictorKind::kOracle, PredictorKind::kIds}) {
    config.predictor = kind;
    const SimulationResult result = Simulate(trace_, config);
    EXPECT_LE(result.stall_ns, none_ns) << "predictor " << static_cast<int>(kind);
    EXPECT_EQ(result.counts.hits + result.counts.late_hits + result.counts.misses, 1400 * 6 * 2);
  }
}

TEST_P(SimulatorPropertyTest, AdaptivePrefetchIsCloseToTheBestFixedHorizon) {
  SimulatorConfig config = Config();
  config.policy = PolicyKind::kOnDemand;
  const int64_t on_demand_ns = Simulate(trace_, config).stall_ns;
  for (const auto kind : {PredictorKind::kOracle, PredictorKind::kIds}) {
    config = Config();
    config.predictor = kind;
    const int64_t adaptive_ns = Simulate(trace_, config).stall_ns;
    for (config.horizon = 1; config.horizon <= Simulator::kMaxHorizon; ++config.horizon) {
      EXPECT_LE(adaptive_ns, Simulate(trace_, config).stall_ns + on_demand_ns / 50)
          << "predictor " << static_cast<int>(kind) << ", horizon " << config.horizon;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Machines, SimulatorPropertyTest,
    testing::Values(Case{PolicyKind::kLru, CacheScope::kGlobal, 300},
                    Case{PolicyKind::kDecayedFrequency, CacheScope::kGlobal, 3000},
                    Case{PolicyKind::kDecayedFrequency, CacheScope::kGlobal, 300},
                    Case{PolicyKind::kDecayedFrequency, CacheScope::kLayer, 1000},
                    Case{PolicyKind::kDecayedFrequency, CacheScope::kGlobal, 10000},
                    Case{PolicyKind::kTwoLevelLru, CacheScope::kGlobal, 1000}));

// The fewest misses that any choice of victims leads to, by trying all of them.
int64_t FewestMisses(const TraceView& trace, size_t num_slots, int64_t step,
                     const std::set<int32_t>& resident) {
  if (step == trace.num_steps()) return 0;
  std::set<int32_t> needed;
  for (const uint16_t id : trace.experts(step)) needed.insert(Index(trace.IndexOf(step, id)));
  std::vector<int32_t> others;
  std::ranges::set_difference(resident, needed, std::back_inserter(others));
  const auto num_misses = static_cast<int64_t>(
      std::ranges::count_if(needed, [&](int32_t expert) { return !resident.contains(expert); }));
  const size_t num_kept = std::min(others.size(), num_slots - needed.size());
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (uint32_t kept = 0; kept < 1U << others.size(); ++kept) {
    std::set<int32_t> next = needed;
    for (size_t i = 0; i < others.size(); ++i) {
      if (kept >> i & 1U) next.insert(others[i]);
    }
    if (next.size() != needed.size() + num_kept) continue;
    fewest = std::min(fewest, FewestMisses(trace, num_slots, step + 1, next));
  }
  return num_misses + fewest;
}

TEST(BeladyTest, MissesAsLittleAsAnyChoiceOfVictims) {
  for (uint32_t seed = 1; seed <= 40; ++seed) {
    const TestTrace trace = SkewedTrace(6, 2, 2, 8, seed);
    const auto num_slots = static_cast<int32_t>(3 + seed % 3);
    SimulatorConfig config = TinyConfig(num_slots, 1000);
    config.belady = true;
    EXPECT_EQ(Simulate(trace, config).counts.misses,
              FewestMisses(trace.view(), static_cast<size_t>(num_slots), 0, {}))
        << "seed " << seed;
  }
}

TEST(BeladyTest, HitsMoreThanEveryPolicy) {
  const TestTrace trace = SkewedTrace(500, 4, 2, 16, 9);
  for (const auto scope : {CacheScope::kGlobal, CacheScope::kLayer}) {
    SimulatorConfig config = TinyConfig(24, 1000);
    config.scope = scope;
    config.belady = true;
    const int64_t belady = Simulate(trace, config).counts.hits;
    config.belady = false;
    for (const auto policy : {PolicyKind::kLru, PolicyKind::kDecayedFrequency}) {
      config.policy = policy;
      EXPECT_GT(belady, Simulate(trace, config).counts.hits);
    }
  }
}

}  // namespace
}  // namespace expertflow
