#include "core/eviction/policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <stdexcept>

#include "core/eviction/predicted_need.h"
#include "core/eviction/two_level_lru.h"

namespace expertflow {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;
using testing::UnorderedElementsAre;

TEST(PolicyTest, ParsesEveryName) {
  EXPECT_THAT(PolicyNames(), UnorderedElementsAre("lru", "decayed_frequency", "two_level_lru",
                                                  "on_demand", "predicted_need"));
  EXPECT_EQ(ParsePolicy("lru"), PolicyKind::kLru);
  EXPECT_EQ(ParsePolicy("decayed_frequency"), PolicyKind::kDecayedFrequency);
  EXPECT_EQ(ParsePolicy("two_level_lru"), PolicyKind::kTwoLevelLru);
  EXPECT_EQ(ParsePolicy("on_demand"), PolicyKind::kOnDemand);
  EXPECT_EQ(ParsePolicy("predicted_need"), PolicyKind::kPredictedNeed);
  EXPECT_EQ(ParseScope("global"), CacheScope::kGlobal);
  EXPECT_EQ(ParseScope("layer"), CacheScope::kLayer);
}

TEST(PolicyTest, AnUnknownNameIsRefusedWithTheKnownOnes) {
  EXPECT_THAT(
      [] { ParsePolicy("LRU"); },
      ThrowsMessage<std::invalid_argument>(AllOf(
          HasSubstr("'LRU'"), HasSubstr("decayed_frequency, predicted_need, lru, two_level_lru"))));
  EXPECT_THAT([] { ParseScope("model"); }, ThrowsMessage<std::invalid_argument>(
                                               AllOf(HasSubstr("'model'"), HasSubstr("global"))));
  EXPECT_THROW(ParsePolicy(""), std::invalid_argument);
}

TEST(TwoLevelLruTest, ProtectsTheJustUsedAndThePredicted) {
  SlotTable table(4, 2, 3);
  const SlotTableView& view = table.view();
  const EvictionParams params{4, 0, nullptr};
  for (int32_t s = 0; s < 3; ++s) Assign(view, SlotId{s}, ExpertIndex{s});
  view.slot_key[0] = 90;  // used long ago, predicted
  view.slot_predicted[0] = 100;
  view.slot_key[1] = 97;  // used within the last 4 ticks
  view.slot_key[2] = 96;  // used just before that
  const auto rank = [&](int32_t slot, Tick now) {
    return RankOf<TwoLevelLru>(params, UseOf(view, slot), now);
  };
  EXPECT_LT(rank(2, 100), rank(0, 100));
  EXPECT_LT(rank(0, 100), rank(1, 100));
  EXPECT_LT(rank(0, 101), rank(2, 101)) << "the prediction has expired";
}

TEST(PredictedNeedTest, RanksByScoreAndProtectsThePredicted) {
  SlotTable table(1, 4, 4);
  const SlotTableView& view = table.view();
  const EvictionParams params{1, 0, nullptr};
  for (int32_t s = 0; s < 4; ++s) {
    Assign(view, SlotId{s}, ExpertIndex{s});
    view.slot_key[s] = PredictedNeed::KeyOnUse(params, view.expert_key[s], 90);
  }
  view.slot_key[3] = kStreamedKey;
  const int32_t scores[] = {-300, 50, -400, 900};
  for (int32_t e = 0; e < 4; ++e) PredictedNeed::RecordScore(view, ExpertIndex{e}, scores[e]);
  view.slot_predicted[2] = view.slot_predicted[3] = 100;
  const auto rank = [&](int32_t slot, Tick now) {
    return RankOf<PredictedNeed>(params, UseOf(view, slot), now);
  };
  EXPECT_EQ(rank(3, 100), kStreamedKey);
  EXPECT_LT(rank(3, 100), rank(0, 100));
  EXPECT_LT(rank(0, 100), rank(1, 100));
  EXPECT_LT(rank(1, 100), rank(2, 100));
  EXPECT_LT(rank(2, 101), rank(0, 101)) << "the prediction has expired";
  EXPECT_EQ(PredictedNeed::KeyOnUse(params, view.expert_key[3], 101) - rank(1, 101), 900 - 50);
}

}  // namespace
}  // namespace expertflow
