// Exact counts on a fixed trace: 2 layers of 8 experts, top-2, 300 tokens, most of them routed to
// three experts of the layer. The numbers come from an independent simulation that keeps every past
// use and sorts.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "core/planner.h"

namespace expertflow {
namespace {

constexpr int32_t kNumLayers = 2;
constexpr int32_t kNumExperts = 8;
constexpr int32_t kTopK = 2;
constexpr int kNumTokens = 300;

struct Step {
  int32_t layer;
  std::array<int64_t, kTopK> experts;
};

std::vector<Step> FixedTrace() {
  uint32_t state = 1;
  const auto draw = [&state] { return (state = state * 1664525U + 1013904223U) >> 16; };
  std::vector<Step> trace;
  for (int token = 0; token < kNumTokens; ++token) {
    for (int32_t layer = 0; layer < kNumLayers; ++layer) {
      Step step{layer, {-1, -1}};
      for (size_t k = 0; k < kTopK;) {
        const int64_t r = draw();
        const int64_t expert = r % 4 == 0 ? (r >> 2) % kNumExperts : (r >> 2) % 3 + layer;
        if (step.experts[0] != expert) step.experts[k++] = expert;
      }
      trace.push_back(step);
    }
  }
  return trace;
}

using Counts = std::tuple<int64_t, int64_t, int64_t>;  // hits, misses, evictions

struct Golden {
  std::string name;
  PolicyKind policy;
  CacheScope scope;
  int32_t num_slots;
  Counts counts;
  int32_t announced_steps = 0;  // how early a resident expert's next use is announced, if it is
};

class GoldenTraceTest : public testing::TestWithParam<Golden> {};

TEST_P(GoldenTraceTest, CountsExactly) {
  const Golden& golden = GetParam();
  SlotTable table(kNumLayers, kNumExperts, golden.num_slots);
  Planner planner(table, {.top_k = kTopK,
                          .expert_bytes = 1,
                          .policy = golden.policy,
                          .scope = golden.scope,
                          .decay_per_token = 0.9});
  const std::vector<Step> trace = FixedTrace();
  const auto announced = static_cast<size_t>(golden.announced_steps);
  for (size_t i = 0; i < trace.size(); ++i) {
    const auto now = static_cast<Tick>(i + 1);
    const Plan* plan = planner.PlanLayer(trace[i].layer, trace[i].experts, 1, now);
    ASSERT_NE(plan, nullptr);
    for (const PlanRow& row : plan->rows) planner.Publish(row.slot);
    if (announced == 0 || i + announced >= trace.size()) continue;
    const Step& later = trace[i + announced];
    const ExpertId expert{later.layer, static_cast<int32_t>(later.experts[0])};
    if (table.view().expert_slot[Index(ToIndex(table.view(), expert))] != SlotId::kNone) {
      planner.PlanPrefetch(expert, now, now + golden.announced_steps);
    }
  }
  LayerStatistics total;
  for (const LayerStatistics& layer : planner.statistics()) total += layer;
  EXPECT_EQ(Counts(total.hits, total.misses, total.evictions), golden.counts);
  EXPECT_EQ(total.late_hits, 0);
}

INSTANTIATE_TEST_SUITE_P(
    Policies, GoldenTraceTest,
    testing::Values(
        Golden{"LruGlobal", PolicyKind::kLru, CacheScope::kGlobal, 6, {714, 486, 480}},
        Golden{"LruPerLayer", PolicyKind::kLru, CacheScope::kLayer, 8, {957, 243, 235}},
        Golden{"DecayedGlobal",
               PolicyKind::kDecayedFrequency,
               CacheScope::kGlobal,
               6,
               {803, 397, 391}},
        Golden{"DecayedPerLayer",
               PolicyKind::kDecayedFrequency,
               CacheScope::kLayer,
               8,
               {1004, 196, 188}},
        // Without predictions the two levels are one LRU.
        Golden{"TwoLevelGlobal", PolicyKind::kTwoLevelLru, CacheScope::kGlobal, 6, {714, 486, 480}},
        Golden{"TwoLevelPredicted",
               PolicyKind::kTwoLevelLru,
               CacheScope::kGlobal,
               6,
               {807, 393, 387},
               4},
        Golden{"NeedGlobal", PolicyKind::kPredictedNeed, CacheScope::kGlobal, 6, {857, 343, 337}},
        Golden{"NeedPerLayer", PolicyKind::kPredictedNeed, CacheScope::kLayer, 8, {1002, 198, 190}},
        Golden{"NeedPredicted",
               PolicyKind::kPredictedNeed,
               CacheScope::kGlobal,
               6,
               {874, 326, 320},
               4},
        Golden{"OnDemand", PolicyKind::kOnDemand, CacheScope::kGlobal, 6, {0, 1200, 1198}}),
    [](const testing::TestParamInfo<Golden>& info) { return info.param.name; });

}  // namespace
}  // namespace expertflow
