// Where routing has a structure, the learned need finds it: misses against LRU's on a trace whose
// tokens walk through fixed sentences in random order.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <random>
#include <vector>

#include "core/planner.h"

namespace expertflow {
namespace {

constexpr int32_t kNumLayers = 4;
constexpr int32_t kNumExperts = 32;
constexpr int32_t kTopK = 2;
constexpr int kNumSentences = 12;
constexpr int kSentenceTokens = 12;

using Token = std::array<std::array<int64_t, kTopK>, kNumLayers>;

std::vector<Token> RandomSentences(std::mt19937& random) {
  std::vector<Token> tokens(size_t{kNumSentences * kSentenceTokens});
  for (Token& token : tokens) {
    for (auto& experts : token) {
      experts[0] = static_cast<int64_t>(random() % kNumExperts);
      do experts[1] = static_cast<int64_t>(random() % kNumExperts);
      while (experts[1] == experts[0]);
    }
  }
  return tokens;
}

int64_t MissesOf(PolicyKind policy, CacheScope scope) {
  std::mt19937 random(5);
  const std::vector<Token> sentences = RandomSentences(random);
  SlotTable table(kNumLayers, kNumExperts, kNumLayers * kNumExperts / 4);
  Planner planner(table, {.top_k = kTopK, .expert_bytes = 1, .policy = policy, .scope = scope});
  Tick now = 0;
  constexpr int kNumRuns = 600;
  for (int run = 0; run < kNumRuns; ++run) {
    if (run == kNumRuns / 2) planner.ResetStatistics();
    const size_t first = random() % kNumSentences * kSentenceTokens;
    for (size_t t = first; t < first + kSentenceTokens; ++t) {
      for (int32_t layer = 0; layer < kNumLayers; ++layer) {
        const auto& experts = sentences[t][static_cast<size_t>(layer)];
        const Plan* plan = planner.PlanLayer(layer, experts, 1, ++now);
        for (const PlanRow& row : plan->rows) planner.Publish(row.slot);
      }
    }
  }
  int64_t misses = 0;
  for (const LayerStatistics& layer : planner.statistics()) misses += layer.misses;
  return misses;
}

class PredictedNeedTest : public testing::TestWithParam<CacheScope> {};

TEST_P(PredictedNeedTest, MissesLessThanRecencyAndFrequency) {
  const int64_t misses = MissesOf(PolicyKind::kPredictedNeed, GetParam());
  EXPECT_LT(misses, MissesOf(PolicyKind::kLru, GetParam()) * 7 / 8);
  EXPECT_LT(misses, MissesOf(PolicyKind::kDecayedFrequency, GetParam()) * 7 / 8);
}

INSTANTIATE_TEST_SUITE_P(Scopes, PredictedNeedTest,
                         testing::Values(CacheScope::kGlobal, CacheScope::kLayer));

}  // namespace
}  // namespace expertflow
