#include "core/biased_router.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

namespace expertflow {
namespace {

using ::testing::ElementsAre;
using Ids = std::vector<int64_t>;
using Mask = std::vector<uint8_t>;

constexpr BiasOptions kUnlimited{.strength = 0.5f, .keep_top = 1, .budget = 1.0};

// Saves up so many routes that the bias of what follows is the full one.
void SaveCredit(BiasedRouter& router, size_t num_experts, size_t top_k, size_t num_tokens) {
  Ids ids(num_tokens * top_k);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(i % top_k);
  std::vector<float> logits;
  for (size_t token = 0; token < num_tokens; ++token) {
    for (size_t e = 0; e < num_experts; ++e) logits.push_back(e < top_k ? 10.0f : 0.0f);
  }
  ASSERT_EQ(router.Reroute(0, logits, Mask(num_experts, 1), ids), 0);
}

// Top-2 of four with a mean range of 10 and credit for it: the bias is 5.
class BiasedRouterTest : public ::testing::Test {
 protected:
  void Make(const BiasOptions& options) {
    router_.emplace(RoutingRule{.num_experts = 4, .top_k = 2}, 1, std::vector<float>(), options);
    SaveCredit(*router_, 4, 2, 1000);
  }
  // Ids after rerouting. The range of the logits should be about 10, to keep the mean.
  Ids Reroute(const std::vector<float>& logits, const Mask& is_resident, Ids ids) {
    router_->Reroute(0, logits, is_resident, ids);
    return ids;
  }
  std::optional<BiasedRouter> router_;
};

TEST_F(BiasedRouterTest, AResidentExpertTakesThePlaceOfAMissingOne) {
  Make(kUnlimited);
  EXPECT_THAT(Reroute({10, 5, 3, 0}, {1, 0, 1, 0}, {0, 1}), ElementsAre(0, 2));
  EXPECT_THAT(Reroute({10, 5, 3, 0}, {1, 0, 1, 0}, {1, 0}), ElementsAre(2, 0));
  EXPECT_EQ(router_->counts()[0].changed, 2);
  EXPECT_EQ(router_->counts()[0].routes, 2 * 1002);
}

TEST_F(BiasedRouterTest, OnlyWithinTheBias) {
  Make(kUnlimited);
  EXPECT_THAT(Reroute({10, 6, 1.1f, 0}, {1, 0, 1, 0}, {0, 1}), ElementsAre(0, 2));
  EXPECT_THAT(Reroute({10, 6, 0.9f, 0}, {1, 0, 1, 0}, {0, 1}), ElementsAre(0, 1));
  EXPECT_THAT(Reroute({10, 5, 0, 0}, {1, 0, 1, 1}, {0, 1}), ElementsAre(0, 1));  // a tie stays
}

TEST_F(BiasedRouterTest, TheBestOfTheResidentsComesIn) {
  Make(kUnlimited);
  EXPECT_THAT(Reroute({10, 5, 3, 4}, {1, 0, 1, 1}, {0, 1}), ElementsAre(0, 3));
  EXPECT_THAT(Reroute({10, 5, 4, 4}, {1, 0, 1, 1}, {0, 1}), ElementsAre(0, 2));  // the first of two
}

TEST_F(BiasedRouterTest, ResidentExpertsAndTheTopStay) {
  Make(kUnlimited);
  EXPECT_THAT(Reroute({10, 5, 4, 0}, {0, 1, 1, 1}, {0, 1}), ElementsAre(0, 1));
  EXPECT_THAT(Reroute({4.2f, 4.3f, 4.1f, -6}, {0, 0, 1, 0}, {0, 1}), ElementsAre(2, 1));
  BiasOptions options = kUnlimited;
  options.keep_top = 2;
  Make(options);
  EXPECT_THAT(Reroute({10, 5, 4, 0}, {0, 0, 1, 1}, {0, 1}), ElementsAre(0, 1));
  options.keep_top = 0;
  Make(options);
  EXPECT_THAT(Reroute({5, 5, 4, -5}, {0, 0, 1, 0}, {0, 1}), ElementsAre(0, 2));
  EXPECT_THAT(Reroute({5, 5, 4, 3}, {0, 0, 1, 1}, {0, 1}), ElementsAre(3, 2));
}

TEST_F(BiasedRouterTest, WithoutStrengthOrBudgetNothingChanges) {
  Make({.strength = 0.0f, .keep_top = 0, .budget = 1.0});
  // The family chose expert 1 though 2 scores more by a rounding: not for us to correct.
  EXPECT_THAT(Reroute({10, 5, 5.001f, 0}, {1, 0, 1, 0}, {0, 1}), ElementsAre(0, 1));
  Make({.strength = 9.0f, .keep_top = 0, .budget = 0.0});
  EXPECT_THAT(Reroute({10, 5, 5.001f, 0}, {1, 0, 1, 0}, {0, 1}), ElementsAre(0, 1));
  EXPECT_EQ(router_->counts()[0].changed, 0);
}

TEST_F(BiasedRouterTest, LogitsThatAreNotFiniteLeaveRoutingAlone) {
  Make(kUnlimited);
  const int64_t routes = router_->counts()[0].routes;
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    EXPECT_THAT(Reroute({10, 5, 4, bad}, {1, 0, 1, 0}, {0, 1}), ElementsAre(0, 1));
  }
  EXPECT_EQ(router_->counts()[0].routes, routes);
  EXPECT_THAT(Reroute({10, 5, 4, 0}, {1, 0, 1, 0}, {0, 1}), ElementsAre(0, 2));
}

TEST_F(BiasedRouterTest, WhatIsFetchedForOneTokenServesTheNext) {
  Make(kUnlimited);
  const std::vector<float> logits = {10, 0, 5, 0, 10, 5, 4, 0};
  EXPECT_THAT(Reroute(logits, {1, 0, 0, 0}, {0, 2, 0, 1}), ElementsAre(0, 2, 0, 2));
}

// Of two equal experts each weighs a half; one with a logit that is smaller by g weighs
// exp(-g) / 2. With a credit of c the swap may move c / 512 of the weight.
TEST(BiasedRouterCreditTest, TheLessThereIsTheLessWeightMayMove) {
  const auto changes = [](size_t credit, float weight_gap) {
    BiasedRouter router({.num_experts = 4, .top_k = 2}, 1, {},
                        {.strength = 1.0f, .keep_top = 1, .budget = 0.5});
    SaveCredit(router, 4, 2, credit - 1);
    Ids ids = {0, 1};
    const float other = 1.0f + std::log(1.0f - 2.0f * weight_gap);
    return router.Reroute(0, std::vector<float>{1, 1, other, -9}, Mask{1, 0, 1, 0}, ids) == 1;
  };
  for (const size_t credit : {size_t{8}, size_t{32}, size_t{128}}) {
    EXPECT_TRUE(changes(credit, 0.98f * static_cast<float>(credit) / 512.0f));
    EXPECT_FALSE(changes(credit, 1.02f * static_cast<float>(credit) / 512.0f));
  }
}

// The sigmoids are .5, .4 and .3: the swap moves .1 / .9 of the weight, whatever the correction.
TEST(BiasedRouterCreditTest, SigmoidsWeighWithoutTheCorrection) {
  const RoutingRule rule{.num_experts = 3, .top_k = 2, .is_sigmoid = true};
  const auto logit = [](float x) { return std::log(x / (1.0f - x)); };
  const std::vector<float> logits = {logit(0.5f), logit(0.4f), logit(0.3f)};
  for (const size_t credit : {size_t{56}, size_t{58}}) {  // of 512, and 56.9 is the border
    BiasedRouter router(rule, 1, {0.3f, 0.0f, 0.0f},
                        {.strength = 9.0f, .keep_top = 1, .budget = 0.5});
    SaveCredit(router, 3, 2, credit - 1);
    Ids ids = {0, 1};
    router.Reroute(0, logits, Mask{1, 0, 1}, ids);
    EXPECT_THAT(ids, ElementsAre(0, credit == 58 ? 2 : 1));
  }
}

TEST(BiasedRouterGroupsTest, NobodyComesFromAnotherGroup) {
  // Two groups of three; DeepSeek-V2 takes the one with the largest maximum.
  BiasedRouter router({.num_experts = 6, .top_k = 2, .num_groups = 2, .top_groups = 1}, 1, {},
                      {.strength = 1.0f, .keep_top = 1, .budget = 1.0});
  const std::vector<float> logits = {9, 5, 0, 8, 8, 8};
  Ids ids = {0, 1};
  EXPECT_EQ(router.Reroute(0, logits, Mask{0, 0, 0, 1, 1, 1}, ids), 0);
  SaveCredit(router, 6, 2, 1000);
  EXPECT_EQ(router.Reroute(0, logits, Mask{0, 0, 0, 1, 1, 1}, ids), 0);
  EXPECT_EQ(router.Reroute(0, logits, Mask{0, 0, 1, 1, 1, 1}, ids), 1);
  EXPECT_THAT(ids, ElementsAre(0, 2));
}

TEST(BiasedRouterSigmoidTest, TheCorrectionOfTheLayerDecidesAboutTheGap) {
  // Scores of layer 1: sigmoids .5, .5, .5 + corrections 1, .4, 0.
  const std::vector<float> corrections = {0, 0, 0, 1.0f, 0.4f, 0.0f};
  const RoutingRule rule{.num_experts = 3, .top_k = 1, .is_sigmoid = true};
  for (const float strength : {0.55f, 0.65f}) {
    BiasedRouter router(rule, 2, corrections, {.strength = strength, .keep_top = 0, .budget = 1.0});
    Ids ids(1000, 0);
    const std::vector<float> logits(3000, 0.0f);
    router.Reroute(1, logits, Mask{1, 0, 0}, ids);
    Ids last = {0};
    router.Reroute(1, std::vector<float>(3, 0.0f), Mask{0, 1, 0}, last);
    EXPECT_THAT(last, ElementsAre(strength > 0.6f ? 1 : 0));
  }
}

// The top-k of scores with the bias, computed the plain way.
Ids TopOfBiased(const std::vector<float>& logits, const Mask& is_resident, size_t top_k,
                size_t keep_top, float bias) {
  std::vector<size_t> order(logits.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const auto by = [&](auto score) { std::ranges::stable_sort(order, std::greater<>(), score); };
  by([&](size_t e) { return logits[e]; });
  std::vector<uint8_t> is_raised = is_resident;
  for (size_t i = 0; i < keep_top; ++i) is_raised[order[i]] = 1;
  by([&](size_t e) { return logits[e] + (is_raised[e] ? bias : 0.0f); });
  return {order.begin(), order.begin() + static_cast<std::ptrdiff_t>(top_k)};
}

TEST(BiasedRouterPropertyTest, ItIsTheTopOfTheBiasedScores) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  constexpr size_t kExperts = 16, kTopK = 4;
  for (size_t trial = 0; trial < 300; ++trial) {
    const auto keep_top = trial % (kTopK + 1);
    BiasedRouter router(
        {.num_experts = kExperts, .top_k = kTopK}, 1, {},
        {.strength = 0.2f, .keep_top = static_cast<int32_t>(keep_top), .budget = 1.0});
    // One pass with every expert resident fixes the mean range, but for the last token.
    std::vector<float> logits(kExperts), many;
    for (float& logit : logits) logit = normal(random);
    for (size_t token = 0; token < 100; ++token)
      many.insert(many.end(), logits.begin(), logits.end());
    Ids exact = TopOfBiased(logits, Mask(kExperts, 0), kTopK, 0, 0.0f), all;
    for (size_t token = 0; token < 100; ++token) all.insert(all.end(), exact.begin(), exact.end());
    router.Reroute(0, many, Mask(kExperts, 1), all);

    Mask is_resident(kExperts);
    for (uint8_t& r : is_resident) r = random() % 2;
    const auto [smallest, largest] = std::ranges::minmax(logits);
    const Ids expected =
        TopOfBiased(logits, is_resident, kTopK, keep_top, 0.2f * (largest - smallest));
    Ids ids = exact;
    router.Reroute(0, logits, is_resident, ids);
    EXPECT_EQ(std::set(ids.begin(), ids.end()), std::set(expected.begin(), expected.end()));
  }
}

TEST(BiasedRouterPropertyTest, TheBudgetIsKeptAfterEveryTokenAndSpent) {
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  constexpr size_t kExperts = 16, kTopK = 4;
  constexpr int32_t kLayers = 3;
  for (const double budget : {0.01, 0.05, 0.3}) {
    BiasedRouter router({.num_experts = kExperts, .top_k = kTopK}, kLayers, {},
                        {.strength = 1.0f, .keep_top = 1, .budget = budget});
    int64_t routes = 0, changed = 0;
    for (int32_t step = 0; step < 30000; ++step) {
      std::vector<float> logits(kExperts);
      for (float& logit : logits) logit = normal(random);
      Ids ids = TopOfBiased(logits, Mask(kExperts, 0), kTopK, 0, 0.0f);
      const Ids wanted = ids;
      Mask is_resident(kExperts);
      for (uint8_t& r : is_resident) r = random() % 4 == 0;
      const int64_t reported = router.Reroute(step % kLayers, logits, is_resident, ids);
      const auto differ = [&](size_t place) { return ids[place] != wanted[place]; };
      int64_t num_changed = 0;
      for (size_t place = 0; place < kTopK; ++place) num_changed += differ(place);
      ASSERT_EQ(reported, num_changed);
      ASSERT_EQ(std::set(ids.begin(), ids.end()).size(), kTopK);
      ASSERT_EQ(ids[0], wanted[0]);
      routes += int64_t{kTopK};
      changed += num_changed;
      ASSERT_LE(static_cast<double>(changed), budget * static_cast<double>(routes));
    }
    RouteCounts total;
    for (const RouteCounts& layer : router.counts()) {
      total.routes += layer.routes;
      total.changed += layer.changed;
      EXPECT_GT(layer.changed, 0);
    }
    EXPECT_EQ(total.routes, routes);
    EXPECT_EQ(total.changed, changed);
    EXPECT_GT(static_cast<double>(changed), 0.9 * budget * static_cast<double>(routes));
    router.ResetCounts();
    EXPECT_EQ(router.counts()[0].routes, 0);
    EXPECT_EQ(router.counts()[0].changed, 0);
  }
}

TEST(BiasedRouterErrorsTest, NameTheCulprit) {
  const RoutingRule rule{.num_experts = 4, .top_k = 2};
  EXPECT_THROW(BiasedRouter(rule, 0, {}, {}), std::invalid_argument);
  EXPECT_THROW(BiasedRouter(rule, 1, {}, {.strength = -0.1f}), std::invalid_argument);
  EXPECT_THROW(BiasedRouter(rule, 1, {}, {.strength = std::nanf("")}), std::invalid_argument);
  EXPECT_THROW(BiasedRouter(rule, 1, {}, {.keep_top = -1}), std::invalid_argument);
  EXPECT_THROW(BiasedRouter(rule, 1, {}, {.budget = 1.1}), std::invalid_argument);
  EXPECT_THROW(BiasedRouter(rule, 1, {}, {.budget = std::nan("")}), std::invalid_argument);
  EXPECT_THROW(BiasedRouter(rule, 2, std::vector<float>(4), {}), std::invalid_argument);
  BiasedRouter router(rule, 1, {}, kUnlimited);
  const std::vector<float> logits(4);
  const Mask none(4);
  Ids ids = {0, 1}, outside = {0, 4}, three = {0, 1, 2};
  EXPECT_THROW(router.Reroute(1, logits, none, ids), std::out_of_range);
  EXPECT_THROW(router.Reroute(0, logits, none, outside), std::out_of_range);
  EXPECT_THROW(router.Reroute(0, logits, none, three), std::invalid_argument);
  EXPECT_THROW(router.Reroute(0, std::vector<float>(5), none, ids), std::invalid_argument);
  EXPECT_THROW(router.Reroute(0, logits, Mask(3), ids), std::invalid_argument);
}

}  // namespace
}  // namespace expertflow
