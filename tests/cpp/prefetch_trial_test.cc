// When prefetching begins and ends, seen in a simulated run whose misses are laid out by hand.

#include "core/prefetch_trial.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "core/simulator.h"
#include "trace_fixture.h"

namespace expertflow {
namespace {

constexpr int32_t kLayers = 4;
constexpr int32_t kExperts = 32;
constexpr size_t kExpertBytes = 4096;
constexpr int32_t kLayerOfMisses = 2;

using IsForeseen = std::function<bool(int64_t token)>;

// Every token needs expert 0 of each layer and, where it misses one, another of kLayerOfMisses, 1
// to 30 in turn, which no other token needs for long. What is not foreseen is taken for expert 31.
TestTrace RareMisses(int64_t num_tokens, int64_t tokens_between, const IsForeseen& is_foreseen) {
  TestTrace trace{kLayers, /*top_k=*/1, kExperts, {}};
  trace.num_distances = trace.num_candidates = 1;
  int64_t num_misses = 0;
  for (int64_t token = 0; token < num_tokens; ++token) {
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      const bool misses = layer == kLayerOfMisses && token % tokens_between == 0;
      trace.expert_ids.push_back(static_cast<uint16_t>(misses ? 1 + num_misses++ % 30 : 0));
    }
  }
  for (size_t step = 0; step < trace.expert_ids.size(); ++step) {
    const size_t next = std::min(step + 1, trace.expert_ids.size() - 1);
    const bool is_right = is_foreseen(static_cast<int64_t>(next) / kLayers);
    const uint16_t expert = trace.expert_ids[next];
    const bool is_resident = expert == 0;
    trace.predicted_ids.push_back(is_resident || is_right ? expert : uint16_t{31});
    trace.need_q16.push_back(62000);
  }
  return trace;
}

// A transfer takes 40 us, a layer 100. One slot more than what every token needs.
class PrefetchTrialTest : public testing::Test {
 protected:
  // The horizon that the adaptive cache has after each token.
  static std::vector<int32_t> Horizons(const TestTrace& trace) {
    Simulator simulator(trace.view(), {.num_slots = kLayers + 1,
                                       .expert_bytes = kExpertBytes,
                                       .policy = PolicyKind::kLru,
                                       .predictor = PredictorKind::kRecorded,
                                       .link = {kExpertBytes / 40e-6, 0},
                                       .layer_time_ns = 100'000});
    std::vector<int32_t> horizons;
    while (!simulator.is_done()) {
      simulator.RunToken();
      horizons.push_back(simulator.horizon());
    }
    return horizons;
  }

  static int64_t FirstAbove0(const std::vector<int32_t>& horizons) {
    return std::ranges::find_if(horizons, [](int32_t h) { return h > 0; }) - horizons.begin();
  }
};

TEST_F(PrefetchTrialTest, BeginsAfterAFewMissesHoweverRareTheyAre) {
  for (const int64_t tokens_between : {5, 50, 500}) {
    const auto horizons =
        Horizons(RareMisses(30 * tokens_between, tokens_between, [](int64_t) { return true; }));
    EXPECT_LT(FirstAbove0(horizons), 20 * tokens_between);
    EXPECT_GT(horizons.back(), 0);
  }
}

TEST_F(PrefetchTrialTest, DoesNotBeginWhereNothingIsForeseen) {
  for (const int64_t tokens_between : {5, 50, 500}) {
    const auto horizons =
        Horizons(RareMisses(30 * tokens_between, tokens_between, [](int64_t) { return false; }));
    EXPECT_EQ(FirstAbove0(horizons), std::ssize(horizons));
  }
}

TEST_F(PrefetchTrialTest, EndsWhenNothingIsForeseenAnyMore) {
  const auto horizons = Horizons(RareMisses(20'000, 1, [](int64_t token) { return token < 4000; }));
  EXPECT_GT(horizons[3999], 0);
  EXPECT_EQ(horizons.back(), 0);
}

}  // namespace
}  // namespace expertflow
