// The host planner and a planner on a block of threads, driven by the same trace with tables of
// their own, and compared after every plan.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "core/layer_plan.h"
#include "core/planner.h"

namespace expertflow {

struct Shape {
  int32_t num_layers;
  int32_t num_experts;
  int32_t top_k;
  int32_t num_slots;
};

// Every array of two tables of the same shape, in host memory.
template <class Visit>
void ForEachArray(const SlotTableView& a, const SlotTableView& b, Visit&& visit) {
  const auto experts = static_cast<size_t>(a.num_layers * a.num_experts);
  const auto slots = static_cast<size_t>(a.num_slots);
  const auto both = [&](const char* name, auto* in_a, auto* in_b, size_t size) {
    visit(name, std::span(in_a, size), std::span(in_b, size));
  };
  both("expert_slot", a.expert_slot, b.expert_slot, experts);
  both("expert_key", a.expert_key, b.expert_key, experts);
  both("slot_expert", a.slot_expert, b.slot_expert, slots);
  both("slot_state", a.slot_state, b.slot_state, slots);
  both("slot_generation", a.slot_generation, b.slot_generation, slots);
  both("slot_key", a.slot_key, b.slot_key, slots);
  both("slot_needed", a.slot_needed, b.slot_needed, slots);
  both("slot_predicted", a.slot_predicted, b.slot_predicted, slots);
  both("slot_unused", a.slot_unused, b.slot_unused, slots);
}

inline void CopyTable(const SlotTableView& from, const SlotTableView& to) {
  ForEachArray(from, to, [](const char*, auto source, auto target) {
    std::ranges::copy(source, target.begin());
  });
}

inline void CopyKeys(const SlotTableView& from, const SlotTableView& to) {
  std::copy_n(from.slot_key, from.num_slots, to.slot_key);
  std::copy_n(from.expert_key, from.num_layers * from.num_experts, to.expert_key);
}

inline void ExpectEqualTables(const SlotTableView& found, const SlotTableView& expected) {
  ForEachArray(found, expected, [](const char* name, auto a, auto b) {
    const auto [in_a, in_b] = std::ranges::mismatch(a, b);
    ASSERT_EQ(in_a, a.end()) << name << " differs at " << in_a - a.begin();
  });
}

inline auto AsTuple(const PlanRow& row) {
  return std::tuple(row.expert, row.slot, row.state, row.wave, row.next_row);
}

inline auto HeaderOf(const LayerPlan& plan) {
  return std::tuple(plan.sequence, plan.tick, plan.status, plan.layer, plan.num_rows, plan.num_hits,
                    plan.num_loading);
}

inline void ExpectEqualPlans(const LayerPlan& found, const LayerPlan& expected) {
  ASSERT_EQ(HeaderOf(found), HeaderOf(expected));
  for (int32_t r = 0; r < expected.num_rows; ++r) {
    ASSERT_EQ(AsTuple(found.rows[r]), AsTuple(expected.rows[r])) << "row " << r;
  }
}

inline void ExpectEqualPlans(const LayerPlan& found, const Plan& expected) {
  ASSERT_EQ(found.status, LayerPlanStatus::kPlanned);
  ASSERT_EQ(found.num_rows, std::ssize(expected.rows));
  EXPECT_EQ(std::tuple(found.tick, found.layer, found.num_hits, found.num_loading),
            std::tuple(expected.tick, expected.layer, expected.num_hits, expected.num_loading));
  for (size_t r = 0; r < expected.rows.size(); ++r) {
    ASSERT_EQ(AsTuple(found.rows[r]), AsTuple(expected.rows[r])) << "row " << r;
  }
}

inline auto Counts(const LayerStatistics& counts) {
  return std::tuple(counts.hits, counts.late_hits, counts.misses, counts.evictions,
                    counts.wasted_prefetch_bytes);
}

// `BlockPlanner` has a table of its own and, beside the constructor (shape, config),
// PlanLayer(layer, ids, fetch), which returns a LayerPlan, CopyTableTo and
// CopyTableFrom(SlotTable&), Statistics(), now() and SetTick(now).
template <class BlockPlanner>
class PairedPlanners {
 public:
  PairedPlanners(const Shape& shape, PolicyKind policy, CacheScope scope, uint64_t seed = 1)
      : random_(seed),
        shape_(shape),
        config_{.top_k = shape.top_k,
                .expert_bytes = 1000,
                .policy = policy,
                .scope = scope,
                .decay_per_token = Draw(0, 1) ? 0.9 : 1.0},
        table_(shape.num_layers, shape.num_experts, shape.num_slots),
        found_table_(shape.num_layers, shape.num_experts, shape.num_slots),
        planner_(table_, config_),
        on_block_(shape, config_) {}

  PairedPlanners(uint64_t seed, PolicyKind policy, CacheScope scope)
      : PairedPlanners(RandomShape(seed, scope), policy, scope, seed) {}

  // Random layers, batches, prefetches and ends of transfers.
  void RunRandom(int num_plans) {
    for (int i = 0; i < num_plans && !testing::Test::HasFailure(); ++i) {
      SCOPED_TRACE("plan " + std::to_string(i));
      const int32_t layer = Draw(0, shape_.num_layers - 1);
      if (Draw(0, 4) == 0) RefuseBadId(layer);
      PlanBoth(layer, RandomIds(), MissFetch::kTransfer);
      ChangeStates();
      on_block_.CopyTableFrom(table_);
    }
  }

  // Layer by layer and token by token, as a recorded trace: a few experts of each layer are much
  // more frequent, and tokens continue what the last one did. The misses of a plan are there for
  // the next.
  void RunSkewed(int num_tokens) {
    std::vector<std::vector<int64_t>> ids(static_cast<size_t>(shape_.num_layers));
    for (int token = 0; token < num_tokens; ++token) {
      for (int32_t layer = 0; layer < shape_.num_layers; ++layer) {
        if (testing::Test::HasFailure()) return;
        SCOPED_TRACE("token " + std::to_string(token) + ", layer " + std::to_string(layer));
        std::vector<int64_t>& of_layer = ids[static_cast<size_t>(layer)];
        NextSkewedIds(layer, of_layer);
        ASSERT_NE(PlanBoth(layer, of_layer, MissFetch::kSameStream), nullptr);
      }
    }
  }

  // `ids` [tokens, layers, top_k], layer by layer and token by token.
  void RunRecorded(const std::vector<int64_t>& ids, int64_t num_tokens) {
    auto next = ids.begin();
    for (int64_t plan = 0; plan < num_tokens * shape_.num_layers; ++plan, next += shape_.top_k) {
      if (testing::Test::HasFailure()) return;
      SCOPED_TRACE("plan " + std::to_string(plan));
      const auto layer = static_cast<int32_t>(plan % shape_.num_layers);
      ASSERT_NE(PlanBoth(layer, {next, next + shape_.top_k}, MissFetch::kSameStream), nullptr);
    }
  }

  const LayerStatistics& statistics(int32_t layer) { return planner_.statistics(layer); }

 private:
  int32_t Draw(int32_t lowest, int32_t highest) {
    return std::uniform_int_distribution<int32_t>(lowest, highest)(random_);
  }

  static Shape RandomShape(uint64_t seed, CacheScope scope) {
    std::mt19937_64 random(seed);
    const auto draw = [&](int32_t lowest, int32_t highest) {
      return std::uniform_int_distribution<int32_t>(lowest, highest)(random);
    };
    Shape shape{.num_layers = draw(1, 5), .num_experts = draw(2, 64), .top_k = 0, .num_slots = 0};
    shape.top_k = draw(1, std::min(shape.num_experts, 8));
    const auto smallest =
        static_cast<int32_t>(Planner::MinSlots(shape.num_layers, shape.top_k, scope));
    // Mostly more slots than a plan takes, so that it is not the host's; some tables of many tiles.
    shape.num_slots =
        seed % 4 == 0 ? smallest : draw(smallest, shape.num_layers * shape.num_experts + 200);
    return shape;
  }

  std::vector<int64_t> RandomIds() {
    const int32_t num_tokens = Draw(0, 2) > 0 ? 1 : Draw(0, kMaxDecodeTokens);
    const int32_t spread = Draw(0, 1) ? shape_.num_experts : std::min(shape_.num_experts, 10);
    std::vector<int64_t> ids(static_cast<size_t>(num_tokens * shape_.top_k));
    for (int64_t& id : ids) id = Draw(0, spread - 1);
    return ids;
  }

  void NextSkewedIds(int32_t layer, std::vector<int64_t>& ids) {
    std::erase_if(ids, [&](int64_t) { return Draw(0, 1) == 0; });
    while (std::ssize(ids) < shape_.top_k) {
      // Squaring favours small numbers; every layer has its own order of experts.
      const double u = std::uniform_real_distribution<double>()(random_);
      const auto place = static_cast<int64_t>(u * u * shape_.num_experts);
      const int64_t id = (place * 7 + layer * 5) % shape_.num_experts;
      if (std::ranges::find(ids, id) == ids.end()) ids.push_back(id);
    }
  }

  // The host's planner is not asked: nothing may change.
  void RefuseBadId(int32_t layer) {
    std::vector<int64_t> ids = RandomIds();
    ids.resize(std::max(ids.size(), static_cast<size_t>(shape_.top_k)));
    ids[static_cast<size_t>(Draw(0, static_cast<int32_t>(std::ssize(ids)) - 1))] =
        shape_.num_experts;
    const std::vector<LayerStatistics> before = on_block_.Statistics();
    ASSERT_EQ(on_block_.PlanLayer(layer, ids, MissFetch::kTransfer).status,
              LayerPlanStatus::kBadExpertId);
    on_block_.CopyTableTo(found_table_);
    ExpectEqualTables(found_table_.view(), table_.view());
    ExpectNothingCounted(before);
  }

  // Plans a layer with both and compares. Returns the host's plan, walked to its end if it has
  // waves, since the other planner leaves those to the host; nullptr if there is none.
  const Plan* PlanBoth(int32_t layer, const std::vector<int64_t>& ids, MissFetch fetch) {
    const std::vector<LayerStatistics> found_before = on_block_.Statistics();
    const std::vector<LayerStatistics> before = planner_.statistics();
    const LayerPlan& found = on_block_.PlanLayer(layer, ids, fetch);
    on_block_.CopyTableTo(found_table_);
    if (found.status == LayerPlanStatus::kNeedsWaves) {
      if (config_.policy == PolicyKind::kPredictedNeed)
        CopyKeys(table_.view(), found_table_.view());
      ExpectEqualTables(found_table_.view(), table_.view());
      EXPECT_EQ(found.num_rows, 0);
      ExpectNothingCounted(found_before);
    }
    const auto num_tokens = static_cast<int32_t>(std::ssize(ids) / shape_.top_k);
    const Plan* plan = planner_.PlanLayer(layer, ids, num_tokens, now_ + 1);
    if (plan == nullptr || plan->num_waves > 1) {
      EXPECT_EQ(found.status, LayerPlanStatus::kNeedsWaves);
      if (plan != nullptr) {
        WalkRows(*plan);
      } else if (config_.policy != PolicyKind::kOnDemand) {  // the host has dropped what was there
        on_block_.CopyTableTo(found_table_);
        ExpectEqualTables(found_table_.view(), table_.view());
      }
      return plan;
    }
    ++now_;
    ExpectEqualPlans(found, *plan);
    if (fetch == MissFetch::kSameStream) {
      for (const PlanRow& row : plan->rows) planner_.Publish(row.slot);
    }
    ExpectEqualTables(found_table_.view(), table_.view());
    ExpectEqualCounts(found_before, before);
    return plan;
  }

  // A plan that was refused, or left to the host, took no tick, either.
  void ExpectNothingCounted(const std::vector<LayerStatistics>& before) {
    EXPECT_EQ(on_block_.now(), now_);
    const std::vector<LayerStatistics> after = on_block_.Statistics();
    for (size_t layer = 0; layer < after.size(); ++layer) {
      EXPECT_EQ(Counts(after[layer]), Counts(before[layer])) << "layer " << layer;
    }
  }

  void ExpectEqualCounts(const std::vector<LayerStatistics>& found_before,
                         const std::vector<LayerStatistics>& before) {
    const std::vector<LayerStatistics> found = on_block_.Statistics();
    for (size_t layer = 0; layer < found.size(); ++layer) {
      const LayerStatistics& expected = planner_.statistics()[layer];
      EXPECT_EQ(Difference(found[layer], found_before[layer]), Difference(expected, before[layer]))
          << "counts of layer " << layer;
    }
  }

  static std::array<int64_t, 5> Difference(const LayerStatistics& after,
                                           const LayerStatistics& before) {
    return {after.hits - before.hits, after.late_hits - before.late_hits,
            after.misses - before.misses, after.evictions - before.evictions,
            after.wasted_prefetch_bytes - before.wasted_prefetch_bytes};
  }

  void WalkRows(const Plan& plan) {
    on_block_.SetTick(++now_);
    for (int32_t r = 0; r < std::ssize(plan.rows); ++r) {
      const SlotId slot = plan.rows[static_cast<size_t>(r)].slot;
      if (IsInFlight(slot)) planner_.Publish(slot);
      planner_.Advance(r);
    }
  }

  bool IsInFlight(SlotId slot) const { return InFlight(table_.view().slot_state[Index(slot)]); }

  void ChangeStates() {
    for (int i = Draw(0, 4); i > 0; --i) {
      planner_.PlanPrefetch({Draw(0, shape_.num_layers - 1), Draw(0, shape_.num_experts - 1)}, now_,
                            now_ + Draw(0, 6));
    }
    for (int32_t s = 0; s < shape_.num_slots; ++s) {
      const SlotId slot{s};
      if (!IsInFlight(slot)) continue;
      const int32_t fate = Draw(0, 9);
      if (fate < 5) planner_.Publish(slot);
      if (fate == 5) planner_.Drop(slot);
      if (fate == 6) planner_.Submit(slot);
    }
  }

  std::mt19937_64 random_;
  Shape shape_;
  PlannerConfig config_;
  SlotTable table_;
  SlotTable found_table_;
  Planner planner_;
  BlockPlanner on_block_;
  Tick now_ = 0;
};

// Ids that the layer lacks are refused, nothing changes, and the next plan is as if they had never
// come.
template <class BlockPlanner>
void ExpectBadIdsAreRefused(PolicyKind policy) {
  const Shape shape{2, 8, 2, 6};
  const PlannerConfig config{.top_k = 2, .expert_bytes = 1, .policy = policy};
  BlockPlanner planner(shape, config);
  SlotTable untouched(2, 8, 6), table(2, 8, 6);
  // Every second launch has ids of 32 bits; the last one here has not, and must not be narrowed.
  for (const int64_t id : {int64_t{8}, int64_t{-1}, (int64_t{1} << 32) + 3}) {
    const LayerPlan& plan = planner.PlanLayer(1, {3, id}, MissFetch::kTransfer);
    EXPECT_EQ(plan.status, LayerPlanStatus::kBadExpertId);
    EXPECT_EQ(plan.num_rows, 0);
    planner.CopyTableTo(table);
    ExpectEqualTables(table.view(), untouched.view());
  }
  const LayerPlan& plan = planner.PlanLayer(1, {3, 4}, MissFetch::kTransfer);
  EXPECT_EQ(plan.status, LayerPlanStatus::kPlanned);
  EXPECT_EQ(plan.tick, 1) << "a refused plan takes no tick";
  EXPECT_EQ(plan.sequence, 4U) << "but is a launch";
}

}  // namespace expertflow
