// Drives the planner with random layers, tokens, prefetches and transfers, and compares it after
// every step with a reference that says the same rules with maps and sorting.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "allocation_counter.h"
#include "core/planner.h"
#include "every_policy.h"
#include "reference_planner.h"

namespace expertflow {
namespace {

struct Shape {
  int32_t num_layers;
  int32_t num_experts;
  int32_t top_k;
  int32_t num_slots;
};

class RandomPlans {
 public:
  RandomPlans(uint64_t seed, PolicyKind policy, CacheScope scope)
      : random_(seed),
        shape_(RandomShape(scope)),
        config_{.top_k = shape_.top_k,
                .expert_bytes = 1000,
                .policy = policy,
                .scope = scope,
                .decay_per_token = Draw(0, 1) ? 0.9 : 1.0},
        table_(shape_.num_layers, shape_.num_experts, shape_.num_slots),
        planner_(table_, config_),
        reference_(shape_.num_layers, shape_.num_experts, shape_.num_slots, config_),
        counts_(static_cast<size_t>(shape_.num_layers)) {}

  // Returns how many victims of withdrawn prefetches were there again.
  int Run(int num_plans) {
    for (int i = 0; i < num_plans && !testing::Test::HasFailure(); ++i) {
      SCOPED_TRACE("plan " + std::to_string(i));
      PlanOneLayer();
      while (Draw(0, 3) > 0) StepTransfer();
      CompareTables();
      if (plan_ != nullptr) WalkRows();
    }
    return num_restored_;
  }

 private:
  int32_t Draw(int32_t lowest, int32_t highest) {
    return std::uniform_int_distribution<int32_t>(lowest, highest)(random_);
  }

  Shape RandomShape(CacheScope scope) {
    Shape shape{.num_layers = Draw(1, 4), .num_experts = Draw(2, 40), .top_k = 0, .num_slots = 0};
    shape.top_k = Draw(1, std::min(shape.num_experts, 6));
    const auto smallest =
        static_cast<int32_t>(Planner::MinSlots(shape.num_layers, shape.top_k, scope));
    shape.num_slots = Draw(0, 2) == 0 ? smallest  // the smallest cache has the rarest cases
                                      : Draw(smallest, shape.num_layers * shape.num_experts);
    return shape;
  }

  // Half of the routes go to a few experts, so that there is something to keep.
  int64_t RandomExpert() {
    return Draw(0, 1) ? Draw(0, shape_.num_experts - 1)
                      : Draw(0, std::min(shape_.top_k, shape_.num_experts - 1));
  }

  void PlanOneLayer() {
    const int32_t layer = Draw(0, shape_.num_layers - 1);
    const int32_t num_tokens = Draw(0, 3) > 0 ? Draw(0, 3) : Draw(kMaxDecodeTokens, 50);
    ids_.resize(static_cast<size_t>(num_tokens * shape_.top_k));
    for (int64_t& id : ids_) id = RandomExpert();
    const std::map<SlotId, ReferencePlanner::Slot> before = SlotsOfReference();
    const std::optional<std::vector<PlanRow>> expected =
        reference_.PlanLayer(layer, ids_, num_tokens, ++now_);
    const int64_t num_allocations_before = num_allocations;
    plan_ = planner_.PlanLayer(layer, ids_, num_tokens, now_);
    EXPECT_EQ(num_allocations, num_allocations_before) << "planning must not allocate";
    ASSERT_EQ(plan_ != nullptr, expected.has_value());
    if (plan_ == nullptr) {
      for (const auto& [slot, state] : before) {
        EXPECT_TRUE(state.in_flight || !reference_.MayTake(layer, slot)) << Index(slot);
      }
      return;
    }
    CompareRows(*expected);
    CheckPlan(before);
    LayerStatistics& counts = counts_[static_cast<size_t>(layer)];
    for (const PlanRow& row : plan_->rows) {
      ++(row.state == RowState::kHit       ? counts.hits
         : row.state == RowState::kLoading ? counts.late_hits
                                           : counts.misses);
    }
  }

  void CompareRows(const std::vector<PlanRow>& expected) {
    ASSERT_EQ(plan_->rows.size(), expected.size());
    for (size_t r = 0; r < expected.size(); ++r) {
      const PlanRow& row = plan_->rows[r];
      EXPECT_EQ(std::tuple(row.expert, row.slot, row.state, row.wave, row.next_row),
                std::tuple(expected[r].expert, expected[r].slot, expected[r].state,
                           expected[r].wave, expected[r].next_row))
          << "row " << r;
    }
  }

  // What must hold whatever the policy.
  void CheckPlan(const std::map<SlotId, ReferencePlanner::Slot>& before) {
    std::set<int64_t> experts;
    std::set<SlotId> first_slots;  // of wave 0 and of residents
    std::set<int32_t> followers;
    int32_t num_displaced = 0;
    int32_t last_wave = 0;
    for (int32_t r = 0; r < std::ssize(plan_->rows); ++r) {
      const PlanRow& row = plan_->rows[static_cast<size_t>(r)];
      EXPECT_TRUE(experts.insert(row.expert).second) << "two rows for one expert";
      EXPECT_TRUE(reference_.MayTake(plan_->layer, row.slot));
      last_wave = std::max(last_wave, row.wave);
      if (row.wave == 0) {
        EXPECT_TRUE(first_slots.insert(row.slot).second) << "a slot taken twice";
        const ReferencePlanner::Slot& held = before.at(row.slot);
        EXPECT_FALSE(row.state == RowState::kMiss && held.in_flight) << "took a slot in flight";
        if (row.state == RowState::kMiss && held.expert && !held.streamed) ++num_displaced;
      } else {
        EXPECT_TRUE(followers.contains(r)) << "nothing leads to row " << r;
      }
      if (row.next_row == kNoRow) continue;
      EXPECT_GT(row.next_row, r);
      EXPECT_TRUE(followers.insert(row.next_row).second) << "two rows lead to one";
      const PlanRow& next = plan_->rows[static_cast<size_t>(row.next_row)];
      EXPECT_EQ(next.slot, row.slot);
      EXPECT_EQ(next.wave, row.wave + 1);
    }
    EXPECT_EQ(experts, std::set<int64_t>(ids_.begin(), ids_.end()));
    EXPECT_EQ(plan_->num_waves, last_wave + 1);
    EXPECT_EQ(planner_.staging_slots(plan_->layer), reference_.staging_slots());
    EXPECT_TRUE(!plan_->streaming || config_.policy == PolicyKind::kOnDemand ||
                num_displaced <= planner_.staging_slots(plan_->layer));
  }

  // The rows in order, as a caller computes them, or only the first few.
  void WalkRows() {
    const auto num_rows = static_cast<int32_t>(plan_->rows.size());
    const int32_t num_walked = Draw(0, 3) > 0 ? num_rows : Draw(0, num_rows);
    for (int32_t r = 0; r < num_walked; ++r) {
      const SlotId slot = plan_->rows[static_cast<size_t>(r)].slot;
      if (Draw(0, 2) == 0) PrefetchOne();
      if (Draw(0, 2) == 0) StepTransfer();
      if (reference_.slot(slot).in_flight) EndTransfer(slot);
      EXPECT_EQ(planner_.Advance(r), reference_.Advance(r));
      if (Draw(0, 9) == 0) {
        EXPECT_EQ(planner_.Advance(r), kNoRow) << "a slot is handed on once";
      }
      CompareTables();
    }
  }

  void PrefetchOne() {
    const ExpertId expert{Draw(0, shape_.num_layers - 1), static_cast<int32_t>(RandomExpert())};
    const Tick needed_at = now_ + Draw(0, 5);
    const int64_t num_allocations_before = num_allocations;
    const SlotId slot = planner_.PlanPrefetch(expert, now_, needed_at);
    EXPECT_EQ(num_allocations, num_allocations_before) << "planning must not allocate";
    if (slot != SlotId::kNone) {
      EXPECT_FALSE(reference_.slot(slot).in_flight) << "took a slot in flight";
      const auto in_slot = [&](const PlanRow& row) { return row.slot == slot; };
      EXPECT_TRUE(std::ranges::none_of(plan_->rows, in_slot)) << "took a slot of the plan";
    }
    EXPECT_EQ(slot, reference_.PlanPrefetch(expert, now_, needed_at));
  }

  void StepTransfer() {
    const SlotId slot{Draw(0, shape_.num_slots - 1)};
    if (!reference_.slot(slot).in_flight) return;
    if (Draw(0, 2) == 0) {
      planner_.Submit(slot);
    } else {
      EndTransfer(slot);
    }
  }

  // Of a prefetch that no plan has needed yet.
  bool MayWithdraw(SlotId slot) const {
    return plan_ != nullptr && table_.view().slot_state[Index(slot)] == SlotState::kPosted &&
           reference_.slot(slot).unused;
  }

  void EndTransfer(SlotId slot) {
    if (MayWithdraw(slot) && Draw(0, 1)) {
      planner_.Withdraw(slot);
      reference_.Withdraw(slot);
      num_restored_ += reference_.slot(slot).expert.has_value();
    } else if (Draw(0, 3) == 0) {
      planner_.Drop(slot);
      reference_.Drop(slot);
    } else {
      planner_.Publish(slot);
      reference_.Publish(slot);
    }
  }

  void CompareTables() {
    const SlotTableView& table = table_.view();
    for (int32_t s = 0; s < shape_.num_slots; ++s) {
      const ReferencePlanner::Slot& expected = reference_.slot(SlotId{s});
      const ExpertIndex expert =
          expected.expert ? ToIndex(table, *expected.expert) : ExpertIndex::kNone;
      ASSERT_EQ(table.slot_expert[s], expert) << "slot " << s;
      ASSERT_EQ(table.slot_state[s] == SlotState::kEmpty, !expected.expert) << "slot " << s;
      ASSERT_EQ(InFlight(table.slot_state[s]), expected.in_flight) << "slot " << s;
      ASSERT_EQ(table.slot_unused[s] != 0, expected.unused) << "slot " << s;
      if (expected.expert) {
        ASSERT_EQ(table.slot_key[s], expected.streamed ? kStreamedKey : expected.key);
        ASSERT_EQ(table.expert_slot[Index(expert)], SlotId{s}) << "the maps disagree";
      }
    }
    for (int32_t e = 0; e < shape_.num_layers * shape_.num_experts; ++e) {
      const SlotId slot = table.expert_slot[e];
      if (slot == SlotId::kNone) continue;
      ASSERT_EQ(table.slot_expert[Index(slot)], ExpertIndex{e}) << "the maps disagree";
    }
    for (int32_t layer = 0; layer < shape_.num_layers; ++layer) {
      const LayerStatistics& found = planner_.statistics(layer);
      const LayerStatistics& counted = counts_[static_cast<size_t>(layer)];
      const LayerStatistics& expected = reference_.statistics(layer);
      ASSERT_EQ(std::tuple(found.hits, found.late_hits, found.misses),
                std::tuple(counted.hits, counted.late_hits, counted.misses));
      ASSERT_EQ(std::tuple(found.evictions, found.wasted_prefetch_bytes),
                std::tuple(expected.evictions, expected.wasted_prefetch_bytes));
    }
  }

  std::map<SlotId, ReferencePlanner::Slot> SlotsOfReference() const {
    std::map<SlotId, ReferencePlanner::Slot> slots;
    for (int32_t s = 0; s < shape_.num_slots; ++s) slots[SlotId{s}] = reference_.slot(SlotId{s});
    return slots;
  }

  std::mt19937_64 random_;
  Shape shape_;
  PlannerConfig config_;
  SlotTable table_;
  Planner planner_;
  ReferencePlanner reference_;
  std::vector<LayerStatistics> counts_;  // hits, late hits and misses, from the rows
  std::vector<int64_t> ids_;
  const Plan* plan_ = nullptr;
  Tick now_ = 0;
  int num_restored_ = 0;
};

class PlannerPropertyTest : public testing::TestWithParam<PolicyAndScope> {};

TEST_P(PlannerPropertyTest, DecidesAsTheReferenceDoes) {
  const auto [policy, scope] = GetParam();
  int num_restored = 0;
  for (uint64_t seed = 0; seed < 300 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    num_restored += RandomPlans(seed, policy, scope).Run(60);
  }
  EXPECT_GT(num_restored, 0);
}

INSTANTIATE_TEST_SUITE_P(AllPolicies, PlannerPropertyTest, EveryPolicyAndScope(),
                         NameOfPolicyAndScope);

}  // namespace
}  // namespace expertflow
