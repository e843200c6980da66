#include "core/planner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <vector>

namespace expertflow {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

// A planner whose transfers end at once unless a test says otherwise.
struct Fixture {
  Fixture(int32_t num_layers, int32_t num_experts, int32_t num_slots, PlannerConfig config)
      : table(num_layers, num_experts, num_slots), planner(table, config) {}

  const Plan* Begin(int32_t layer, const std::vector<int64_t>& ids, int32_t num_tokens = 1) {
    return planner.PlanLayer(layer, ids, num_tokens, ++now);
  }

  // Plans a layer and computes all of it.
  const Plan* Run(int32_t layer, const std::vector<int64_t>& ids, int32_t num_tokens = 1) {
    const Plan* plan = Begin(layer, ids, num_tokens);
    for (int32_t r = 0; r < std::ssize(plan->rows); ++r) {
      planner.Publish(plan->rows[static_cast<size_t>(r)].slot);
      planner.Advance(r);
    }
    return plan;
  }

  std::vector<int32_t> Residents(int32_t layer) const {
    std::vector<int32_t> experts;
    for (int32_t e = 0; e < table.view().num_experts; ++e) {
      if (SlotOf({layer, e}) != SlotId::kNone) experts.push_back(e);
    }
    return experts;
  }

  SlotId SlotOf(ExpertId expert) const {
    return table.view().expert_slot[Index(ToIndex(table.view(), expert))];
  }

  SlotTable table;
  Planner planner;
  Tick now = 0;
};

constexpr PlannerConfig kLruTop2{.top_k = 2, .expert_bytes = 100, .policy = PolicyKind::kLru};

std::vector<int64_t> Range(int64_t begin, int64_t end) {
  std::vector<int64_t> ids(static_cast<size_t>(end - begin));
  std::iota(ids.begin(), ids.end(), begin);
  return ids;
}

TEST(PlannerTest, RefusesACacheSmallerThanOneLayersTopK) {
  SlotTable table(3, 8, 5);
  PlannerConfig config = kLruTop2;
  EXPECT_NO_THROW(Planner(table, config));
  config.scope = CacheScope::kLayer;  // 3 layers of 2
  EXPECT_THROW(Planner(table, config), std::invalid_argument);
  EXPECT_EQ(Planner::MinSlots(3, 2, CacheScope::kLayer), 6);
  EXPECT_EQ(Planner::MinSlots(3, 2, CacheScope::kGlobal), 2);
}

TEST(PlannerTest, RefusesATopKOrDecayThatMakesNoSense) {
  SlotTable table(1, 4, 4);
  for (const int32_t top_k : {0, -1, 5}) {
    EXPECT_THROW(Planner(table, {.top_k = top_k, .expert_bytes = 1}), std::invalid_argument);
  }
  for (const double decay : {0.0, -0.5, 1.5, std::nan("")}) {
    EXPECT_THROW(Planner(table, {.top_k = 1, .expert_bytes = 1, .decay_per_token = decay}),
                 std::invalid_argument);
  }
}

TEST(PlannerTest, RefusesLayersAndExpertsThatTheModelLacks) {
  Fixture f(2, 4, 4, kLruTop2);
  EXPECT_THROW(f.Begin(2, {0}), std::out_of_range);
  EXPECT_THROW(f.Begin(-1, {0}), std::out_of_range);
  EXPECT_THROW(f.Begin(0, {0, 4}), std::out_of_range);
  EXPECT_THROW(f.Begin(0, {-1}), std::out_of_range);
  EXPECT_THROW(f.Begin(0, {int64_t{1} << 32}), std::out_of_range) << "not to be cut to 32 bits";
  EXPECT_THROW(f.planner.PlanPrefetch({0, 4}, 1, 1), std::out_of_range);
  EXPECT_THROW(f.planner.PlanPrefetch({2, 0}, 1, 1), std::out_of_range);
  EXPECT_EQ(f.Run(0, {0, 1})->rows.size(), 2U) << "a refused call must leave the planner usable";
}

TEST(PlannerTest, AnEmptyBatchIsAPlanWithoutRows) {
  Fixture f(1, 4, 2, kLruTop2);
  const Plan* plan = f.Begin(0, {}, 0);
  ASSERT_NE(plan, nullptr);
  EXPECT_THAT(plan->rows, IsEmpty());
  EXPECT_EQ(f.planner.statistics(0).misses, 0);
}

TEST(PlannerTest, RowsAreHitsThenLateHitsThenMissesEachOnce) {
  Fixture f(1, 8, 6, kLruTop2);
  f.Run(0, {5});
  f.planner.PlanPrefetch({0, 3}, f.now, f.now + 1);
  const Plan* plan = f.Begin(0, {7, 3, 5, 7, 3, 6}, 3);
  ASSERT_EQ(plan->rows.size(), 4U);
  EXPECT_EQ(plan->num_hits, 1);
  EXPECT_EQ(plan->num_loading, 1);
  const int32_t experts[] = {5, 3, 7, 6};
  const RowState states[] = {RowState::kHit, RowState::kLoading, RowState::kMiss, RowState::kMiss};
  for (size_t r = 0; r < 4; ++r) {
    EXPECT_EQ(plan->rows[r].expert, experts[r]);
    EXPECT_EQ(plan->rows[r].state, states[r]);
  }
  EXPECT_EQ(f.planner.statistics(0).late_hits, 1);
}

// vllm-project/vllm#37190: evicting an expert of the running layer gives wrong weights, silently.
TEST(PlannerTest, AnExpertOfThisLayerIsNeverAVictim) {
  Fixture f(1, 8, 2, kLruTop2);
  f.Run(0, {0});
  f.Run(0, {1});
  const Plan* plan = f.Begin(0, {0, 2});  // 0 is the least recently used
  EXPECT_EQ(f.SlotOf({0, 0}), plan->rows[0].slot);
  EXPECT_NE(plan->rows[1].slot, plan->rows[0].slot);
  EXPECT_THAT(f.Residents(0), ElementsAre(0, 2));
}

TEST(PlannerTest, MoreExpertsThanSlotsComeInWavesThroughTheSameSlots) {
  Fixture f(1, 8, 3, kLruTop2);
  const Plan* plan = f.Begin(0, Range(0, 8), 4);
  EXPECT_EQ(plan->num_waves, 3);
  std::vector<int32_t> waves, nexts;
  for (const PlanRow& row : plan->rows) {
    waves.push_back(row.wave);
    nexts.push_back(row.next_row);
  }
  EXPECT_THAT(waves, ElementsAre(0, 0, 0, 1, 1, 1, 2, 2));
  EXPECT_THAT(nexts, ElementsAre(3, 4, 5, 6, 7, kNoRow, kNoRow, kNoRow));
  EXPECT_EQ(f.SlotOf({0, 3}), SlotId::kNone) << "wave 1 has no slot before a row is released";
  f.planner.Publish(plan->rows[0].slot);
  EXPECT_EQ(f.planner.Advance(0), 3);
  EXPECT_EQ(f.SlotOf({0, 3}), plan->rows[0].slot);
  EXPECT_EQ(f.SlotOf({0, 0}), SlotId::kNone);
}

TEST(PlannerTest, MissesFollowHitsWhenTransfersHoldAllOtherSlots) {
  Fixture f(1, 8, 3, kLruTop2);
  f.Run(0, {0});
  f.planner.PlanPrefetch({0, 1}, f.now, f.now + 9);
  f.planner.PlanPrefetch({0, 2}, f.now, f.now + 9);
  const Plan* plan = f.Begin(0, {5, 0});
  ASSERT_NE(plan, nullptr);
  EXPECT_EQ(plan->rows[1].wave, 1);
  EXPECT_EQ(plan->rows[0].next_row, 1);
  EXPECT_EQ(f.planner.Advance(0), 1);
  EXPECT_EQ(f.SlotOf({0, 5}), plan->rows[0].slot);
}

TEST(PlannerTest, NoPlanWhileTransfersHoldEverySlotAndNothingChanges) {
  Fixture f(1, 8, 2, kLruTop2);
  const SlotId first = f.planner.PlanPrefetch({0, 1}, 0, 9);
  const SlotId second = f.planner.PlanPrefetch({0, 2}, 0, 9);
  EXPECT_EQ(f.Begin(0, {5, 6}), nullptr);
  EXPECT_EQ(f.SlotOf({0, 1}), first);
  EXPECT_EQ(f.SlotOf({0, 2}), second);
  EXPECT_EQ(f.planner.statistics(0).misses, 0);
  f.planner.Drop(first);
  const Plan* plan = f.planner.PlanLayer(0, std::vector<int64_t>{5, 6}, 1, f.now);
  ASSERT_NE(plan, nullptr);
  EXPECT_EQ(plan->num_waves, 2);
}

TEST(PlannerTest, ALongPromptDoesNotWashOutTheDecodeCache) {
  Fixture f(1, 64, 32, kLruTop2);
  for (int64_t e = 0; e < 32; ++e) f.Run(0, {e});
  ASSERT_EQ(f.planner.staging_slots(0), 4);
  f.Run(0, Range(32, 64), kMaxDecodeTokens + 1);
  EXPECT_EQ(f.Residents(0).size(), 32U);
  for (int32_t e = 4; e < 32; ++e) {
    EXPECT_NE(f.SlotOf({0, e}), SlotId::kNone) << "expert " << e << " was washed out";
  }
  // And what the prompt brought in goes first.
  f.Run(0, {0, 1});
  f.Run(0, {2, 3});
  for (int32_t e = 0; e < 32; ++e) EXPECT_NE(f.SlotOf({0, e}), SlotId::kNone) << e;
}

TEST(PlannerTest, APromptTakesNoMoreOfALargeCacheThanItsTransfersNeed) {
  Fixture f(1, 1024, 512, kLruTop2);
  for (int64_t e = 0; e < 512; ++e) f.Run(0, {e});
  f.Run(0, Range(512, 1024), kMaxDecodeTokens + 1);
  for (int32_t e = Planner::kMaxStagingSlots; e < 512; ++e) {
    EXPECT_NE(f.SlotOf({0, e}), SlotId::kNone) << "expert " << e << " was washed out";
  }
}

TEST(PlannerTest, APromptFillsEmptySlotsBeyondTheStagingSlots) {
  Fixture f(1, 64, 32, kLruTop2);
  EXPECT_EQ(f.Run(0, Range(0, 32), 100)->num_waves, 1);
  EXPECT_EQ(f.Residents(0).size(), 32U);
}

TEST(PlannerTest, DecodeKeepsAnExpertThatAPromptStreamedInOnceItIsUsed) {
  Fixture f(1, 8, 2, kLruTop2);
  f.Run(0, {0, 1}, 100);
  f.Run(0, {0});
  f.Run(0, {2});
  EXPECT_THAT(f.Residents(0), ElementsAre(0, 2));
}

TEST(PlannerTest, LayersKeepToTheirOwnShare) {
  PlannerConfig config = kLruTop2;
  config.scope = CacheScope::kLayer;
  Fixture f(2, 8, 7, config);  // 3 a layer, one left over
  for (int64_t e = 0; e < 8; ++e) f.Run(0, {e});
  f.Run(1, {4});
  EXPECT_THAT(f.Residents(0), ElementsAre(5, 6, 7));
  EXPECT_THAT(f.Residents(1), ElementsAre(4));
}

TEST(PlannerTest, FrequencyIsRememberedAcrossEviction) {
  Fixture f(1, 8, 2, {.top_k = 1, .expert_bytes = 1, .policy = PolicyKind::kDecayedFrequency});
  for (int i = 0; i < 10; ++i) f.Run(0, {0});
  for (int i = 0; i < 32; ++i) f.Run(0, {1 + i % 2});  // in turn, in the slot beside 0
  EXPECT_THAT(f.Residents(0), ElementsAre(1, 2)) << "their uses from before eviction count";
}

TEST(PlannerPrefetchTest, MarksAResidentExpertAndTakesNoSlotForIt) {
  PlannerConfig config = kLruTop2;
  config.policy = PolicyKind::kTwoLevelLru;
  Fixture f(1, 8, 2, config);
  f.Run(0, {0});
  f.Run(0, {1});
  EXPECT_EQ(f.planner.PlanPrefetch({0, 0}, f.now, f.now + 5), SlotId::kNone);
  f.Run(0, {2});
  EXPECT_THAT(f.Residents(0), ElementsAre(0, 2)) << "the predicted expert stays";
}

TEST(PlannerPrefetchTest, TakesAnotherSlotThanAPredictedOne) {
  Fixture f(1, 8, 3, kLruTop2);
  for (int64_t e = 0; e < 3; ++e) f.Run(0, {e});
  f.planner.PlanPrefetch({0, 0}, f.now, f.now + 5);  // predicted, and least recently used
  EXPECT_NE(f.planner.PlanPrefetch({0, 7}, f.now, f.now + 5), SlotId::kNone);
  EXPECT_THAT(f.Residents(0), ElementsAre(0, 2, 7));
  EXPECT_EQ(f.planner.PlanPrefetch({0, 6}, f.now, f.now + 5), SlotId::kNone)
      << "the rest is the current plan's, or predicted";
}

TEST(PlannerPrefetchTest, TakesTheSlotThatAPredictedOneGivesUp) {
  PlannerConfig config = kLruTop2;
  config.scope = CacheScope::kLayer;
  Fixture f(2, 8, 4, config);
  f.Run(0, {0, 1});
  f.Run(1, {0, 1});
  f.planner.PlanPrefetch({0, 0}, f.now, f.now + 5);
  f.planner.PlanPrefetch({0, 1}, f.now, f.now + 5);
  EXPECT_EQ(f.planner.PlanPrefetch({0, 7}, f.now, f.now + 5), SlotId::kNone);
  EXPECT_FALSE(f.planner.Unprotect({0, 0}, f.now, {1, 7})) << "a slot of another layer";
  EXPECT_FALSE(f.planner.Unprotect({1, 0}, f.now, {1, 7})) << "of the current plan";
  EXPECT_FALSE(f.planner.Unprotect({0, 5}, f.now, {0, 7})) << "not resident";
  EXPECT_FALSE(f.planner.Unprotect({0, 1}, f.now, {0, 0})) << "for what is resident";
  EXPECT_EQ(f.planner.PlanPrefetch({0, 7}, f.now, f.now + 5), SlotId::kNone);
  EXPECT_TRUE(f.planner.Unprotect({0, 1}, f.now, {0, 7}));
  EXPECT_NE(f.planner.PlanPrefetch({0, 7}, f.now, f.now + 5), SlotId::kNone);
  EXPECT_THAT(f.Residents(0), ElementsAre(0, 7));
  EXPECT_FALSE(f.planner.Unprotect({0, 7}, f.now, {0, 6})) << "in flight";
}

TEST(PlannerPrefetchTest, LeavesTheSlotOfARowThatFailedAlone) {
  Fixture f(1, 8, 2, kLruTop2);
  const Plan* plan = f.Begin(0, {0, 1});
  f.planner.Drop(plan->rows[0].slot);  // its transfer failed
  EXPECT_EQ(f.planner.PlanPrefetch({0, 5}, f.now, f.now + 1), SlotId::kNone);
  EXPECT_EQ(f.table.view().slot_expert[Index(plan->rows[0].slot)], ExpertIndex::kNone);
  f.Begin(0, {1});
  EXPECT_NE(f.planner.PlanPrefetch({0, 5}, f.now, f.now + 1), SlotId::kNone);
}

// Otherwise the expert would be resident twice, and evicting one copy would hide the other.
TEST(PlannerPrefetchTest, LeavesExpertsToARowThatWaitsForItsSlot) {
  Fixture f(2, 8, 4, {.top_k = 2, .expert_bytes = 1, .scope = CacheScope::kGlobal});
  f.planner.PlanPrefetch({1, 0}, 0, 9);
  f.planner.PlanPrefetch({1, 1}, 0, 9);
  const Plan* plan = f.Begin(0, {0, 1, 2, 3}, 2);
  ASSERT_EQ(plan->num_waves, 2);
  for (const SlotId slot : {SlotId{0}, SlotId{1}}) f.planner.Drop(slot);
  EXPECT_EQ(f.planner.PlanPrefetch({0, 3}, f.now, f.now + 2), SlotId::kNone);
  EXPECT_NE(f.planner.PlanPrefetch({0, 4}, f.now, f.now + 2), SlotId::kNone);
}

TEST(PlannerPrefetchTest, BytesAreWastedIfTheExpertIsEvictedUnused) {
  Fixture f(2, 8, 2, kLruTop2);
  f.planner.Publish(f.planner.PlanPrefetch({1, 3}, 0, 0));
  f.planner.Publish(f.planner.PlanPrefetch({1, 4}, 0, 9));
  f.Run(1, {4});
  f.Run(0, {0, 1});
  EXPECT_EQ(f.planner.statistics(1).wasted_prefetch_bytes, 100) << "of expert 3 only";
  EXPECT_EQ(f.planner.statistics(1).evictions, 2);
}

TEST(PlannerPrefetchTest, WhatAWithdrawnOneReplacedIsThereAgain) {
  Fixture f(2, 8, 2, kLruTop2);
  f.Run(0, {3});
  f.Run(0, {4});
  const SlotId slot = f.SlotOf({0, 3});
  ASSERT_EQ(f.planner.PlanPrefetch({1, 0}, f.now, f.now + 1), slot);
  f.planner.Withdraw(slot);
  EXPECT_THAT(f.Residents(1), IsEmpty());
  EXPECT_EQ(f.SlotOf({0, 3}), slot);
  EXPECT_EQ(f.planner.statistics(1).wasted_prefetch_bytes, 0);
  f.Run(1, {1});
  EXPECT_THAT(f.Residents(0), ElementsAre(4)) << "3 is still the least recently used";
}

TEST(PlannerPrefetchTest, NothingIsThereAgainThatIsElsewhere) {
  Fixture f(2, 8, 3, kLruTop2);
  for (int64_t e = 3; e < 6; ++e) f.Run(0, {e});
  const SlotId slot = f.SlotOf({0, 3});
  ASSERT_EQ(f.planner.PlanPrefetch({1, 0}, f.now, f.now + 2), slot);
  f.Run(0, {3});  // missed, and brought into another slot
  f.Run(1, {6});
  f.planner.Withdraw(slot);
  EXPECT_NE(f.SlotOf({0, 3}), slot);
  EXPECT_EQ(f.table.view().slot_state[Index(slot)], SlotState::kEmpty);
}

// It would be resident twice once its row takes over a slot.
TEST(PlannerPrefetchTest, NothingIsThereAgainThatARowOfThePlanBrings) {
  Fixture f(1, 8, 2, kLruTop2);
  f.Run(0, {0, 1});
  ++f.now;  // a layer elsewhere
  const SlotId slot = f.SlotOf({0, 0});
  ASSERT_EQ(f.planner.PlanPrefetch({0, 7}, f.now, f.now + 2), slot);
  const Plan* plan = f.Begin(0, {1, 0});
  ASSERT_EQ(plan->num_waves, 2) << "0 waits for the slot of 1";
  f.planner.Withdraw(slot);
  EXPECT_EQ(f.table.view().slot_state[Index(slot)], SlotState::kEmpty);
  EXPECT_NE(f.planner.Advance(0), kNoRow);
  EXPECT_NE(f.SlotOf({0, 0}), slot);
}

TEST(PlannerPrefetchTest, NothingIsThereAgainOfATransferThatFailed) {
  Fixture f(1, 8, 1, {.top_k = 1, .expert_bytes = 1, .policy = PolicyKind::kLru});
  f.planner.Drop(f.Begin(0, {3})->rows[0].slot);
  ++f.now;
  const SlotId slot = f.planner.PlanPrefetch({0, 5}, f.now, f.now + 1);
  ASSERT_NE(slot, SlotId::kNone);
  f.planner.Withdraw(slot);
  EXPECT_THAT(f.Residents(0), IsEmpty());
}

TEST(PlannerPrefetchTest, OnDemandWastesWhatWasPrefetched) {
  PlannerConfig config = kLruTop2;
  config.policy = PolicyKind::kOnDemand;
  Fixture f(1, 8, 3, config);
  f.planner.Publish(f.planner.PlanPrefetch({0, 3}, 0, 9));
  EXPECT_EQ(f.Run(0, {3})->num_hits, 0);
  EXPECT_EQ(f.planner.statistics(0).wasted_prefetch_bytes, 100);
}

}  // namespace
}  // namespace expertflow
