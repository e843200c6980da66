#include "core/prefetch_ledger.h"

#include <gtest/gtest.h>

#include <vector>

#include "core/planner.h"

namespace expertflow {
namespace {

// One layer of 8 experts, top-1, two slots.
class PrefetchLedgerTest : public testing::Test {
 protected:
  void Need(int64_t expert) {
    const std::vector<int64_t> ids{expert};
    const Plan* plan = planner_.PlanLayer(0, ids, 1, ++now_);
    ASSERT_NE(plan, nullptr);
    ledger_.RecordPlan(*plan);
    planner_.Publish(plan->rows[0].slot);
  }

  // It arrives at once, unless `is_late`.
  SlotId Prefetch(int32_t expert, bool is_late = false) {
    const SlotId slot = planner_.PlanPrefetch({0, expert}, now_, now_);
    EXPECT_NE(slot, SlotId::kNone);
    ledger_.RecordPrefetch(slot, {0, expert}, now_);
    if (!is_late) planner_.Publish(slot);
    return slot;
  }

  void Withdraw(SlotId slot) {
    planner_.Withdraw(slot);
    ledger_.RecordWithdrawal(slot);
  }

  void ExpectCounts(int32_t used, int32_t ready, int32_t wasted, int32_t regretted) {
    const PrefetchLedger::Counts counts = ledger_.TakeCounts();
    EXPECT_EQ(counts.used, used);
    EXPECT_EQ(counts.ready, ready);
    EXPECT_EQ(counts.wasted, wasted);
    EXPECT_EQ(counts.regretted, regretted);
  }

  SlotTable table_{1, 8, 2};
  Planner planner_{table_, {.top_k = 1, .expert_bytes = 1, .policy = PolicyKind::kLru}};
  PrefetchLedger ledger_{table_.view()};
  Tick now_ = 0;
};

TEST_F(PrefetchLedgerTest, CountsTheFirstUseOnly) {
  Need(0);
  Prefetch(1);
  Need(1);
  Need(1);
  ExpectCounts(1, 1, 0, 0);
  ExpectCounts(0, 0, 0, 0);
}

TEST_F(PrefetchLedgerTest, LateIsUsedButNotReady) {
  Need(0);
  Prefetch(1, /*is_late=*/true);
  Need(1);
  ExpectCounts(1, 0, 0, 0);
}

TEST_F(PrefetchLedgerTest, EvictedWithoutAUseIsWasted) {
  Need(0);
  Prefetch(1);
  Need(0);
  Need(2);  // evicts 1, whose slot was empty before
  ExpectCounts(0, 0, 1, 0);
}

TEST_F(PrefetchLedgerTest, VictimThatIsMissedMeanwhileIsRegretted) {
  Need(0);
  Need(1);
  Prefetch(2);  // evicts 0
  Need(0);      // a miss, which evicts 2
  ExpectCounts(0, 0, 1, 1);
}

TEST_F(PrefetchLedgerTest, VictimThatTheSamePlanNeedsIsRegretted) {
  Planner planner(table_, {.top_k = 2, .expert_bytes = 1, .policy = PolicyKind::kLru});
  const auto need = [&](std::vector<int64_t> ids) {
    const Plan* plan = planner.PlanLayer(0, ids, 1, ++now_);
    ledger_.RecordPlan(*plan);
    for (const PlanRow& row : plan->rows) planner.Publish(row.slot);
  };
  need({0, 1});
  ++now_;  // a layer elsewhere
  const SlotId slot = planner.PlanPrefetch({0, 2}, now_, now_ + 1);
  ledger_.RecordPrefetch(slot, {0, 2}, now_);  // evicts 0
  planner.Publish(slot);
  need({2, 0});  // a demand would have evicted 1
  ExpectCounts(1, 1, 0, 1);
}

TEST_F(PrefetchLedgerTest, MissBeforeThePrefetchIsNoRegret) {
  Need(0);
  Need(1);
  Prefetch(2);  // evicts 0, which was missed before only
  Need(1);
  Need(3);  // evicts 2
  ExpectCounts(0, 0, 1, 0);
}

TEST_F(PrefetchLedgerTest, WithdrawnIsNeitherUsedNorWasted) {
  Need(0);
  Need(1);
  const SlotId slot = Prefetch(2, /*is_late=*/true);  // evicts 0
  Withdraw(slot);
  Need(0);
  Need(2);  // evicts 1
  ExpectCounts(0, 0, 0, 0);
}

TEST_F(PrefetchLedgerTest, DroppedIsWastedAndNobodysVictim) {
  Need(0);
  const SlotId slot = Prefetch(1, /*is_late=*/true);
  planner_.Drop(slot);
  ledger_.RecordDrop(slot);
  ExpectCounts(0, 0, 1, 0);
  EXPECT_EQ(Prefetch(2), slot);
  for (const int64_t expert : {1, 3, 4}) Need(expert);
  ExpectCounts(0, 0, 1, 0);
}

TEST_F(PrefetchLedgerTest, WhatAWithdrawnOneEvictedIsTheVictimOfTheNext) {
  Need(0);
  Need(1);
  const SlotId slot = Prefetch(2, /*is_late=*/true);  // evicts 0
  Withdraw(slot);
  ASSERT_EQ(Prefetch(3), slot);
  Need(0);  // evicts 3
  ExpectCounts(0, 0, 1, 1);
}

TEST_F(PrefetchLedgerTest, VictimThatIsMissedBeforeTheWithdrawalIsRegretted) {
  SlotTable table(1, 8, 3);
  Planner planner(table, {.top_k = 1, .expert_bytes = 1, .policy = PolicyKind::kLru});
  ledger_ = PrefetchLedger(table.view());
  const auto need = [&](int64_t expert) {
    const Plan* plan = planner.PlanLayer(0, std::vector{expert}, 1, ++now_);
    ledger_.RecordPlan(*plan);
    planner.Publish(plan->rows[0].slot);
  };
  for (const int64_t expert : {0, 1, 2}) need(expert);
  const SlotId slot = planner.PlanPrefetch({0, 3}, now_, now_ + 2);
  ledger_.RecordPrefetch(slot, {0, 3}, now_);  // evicts 0
  need(0);
  planner.Withdraw(slot);
  ledger_.RecordWithdrawal(slot);
  ExpectCounts(0, 0, 0, 1);
  // 0 is elsewhere, so the slot is empty, and what is prefetched into it evicts none.
  ++now_;
  ASSERT_EQ(planner.PlanPrefetch({0, 4}, now_, now_ + 2), slot);
  ledger_.RecordPrefetch(slot, {0, 4}, now_);
  planner.Publish(slot);
  for (const int64_t expert : {5, 6, 0}) need(expert);  // evict 2, 0 and 4
  ExpectCounts(0, 0, 1, 0);
}

}  // namespace
}  // namespace expertflow
