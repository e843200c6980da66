// Random layers, tokens and prefetches against a source whose reads fail, write garbage and dawdle:
// never a wrong byte in a slot, never a hang, and an error names the expert and can be retried.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "every_policy.h"
#include "host/expert_cache.h"
#include "scripted_source.h"
#include "watchdog.h"

namespace expertflow {
namespace {

class RandomLayers {
 public:
  RandomLayers(uint64_t seed, PolicyKind policy, CacheScope scope)
      : random_(seed),
        options_(RandomOptions(policy, scope)),
        layout_({{"weights", DType::kFloat32, static_cast<size_t>(64 * Draw(1, 16))}}),
        source_(std::make_shared<ScriptedSource>(NumExperts(), layout_.slot_bytes())) {
    options_.planner.expert_bytes = layout_.slot_bytes();
    cache_ = std::make_unique<ExpertCache>(source_, layout_, options_);
  }

  void Run(int num_layers) {
    for (int i = 0; i < num_layers && !testing::Test::HasFailure(); ++i) {
      SCOPED_TRACE("layer " + std::to_string(i));
      constexpr std::array<int16_t, 4> kFailPercents = {0, 0, 5, 60};
      source_->set_faults({.fail_percent = kFailPercents[static_cast<size_t>(Draw(0, 3))],
                           .slow_percent = static_cast<int16_t>(Draw(0, 3) ? 0 : 50)});
      PrefetchSome();
      const int32_t layer = Draw(0, options_.num_layers - 1);
      const std::vector<int64_t> ids = RandomIds();
      if (ComputeLayer(layer, ids)) continue;
      source_->set_faults({});
      EXPECT_TRUE(ComputeLayer(layer, ids)) << "a retry must succeed once the source is well";
    }
    source_->set_faults({});
    CheckStatistics();
    PrefetchSome();  // and destroy the cache with transfers in flight
  }

  static int num_failures_seen;

 private:
  int32_t Draw(int32_t lowest, int32_t highest) {
    return std::uniform_int_distribution<int32_t>(lowest, highest)(random_);
  }

  size_t NumExperts() const {
    return static_cast<size_t>(options_.num_layers * options_.num_experts);
  }

  ExpertCacheOptions RandomOptions(PolicyKind policy, CacheScope scope) {
    ExpertCacheOptions options{.num_layers = Draw(1, 4),
                               .num_experts = Draw(2, 16),
                               .num_slots = 0,
                               .planner = {.top_k = 0, .expert_bytes = 0},
                               .chunk_bytes = static_cast<size_t>(Draw(1, 1500)),
                               .num_threads = Draw(1, 3)};
    options.planner.top_k = Draw(1, std::min(options.num_experts, 4));
    options.planner.policy = policy;
    options.planner.scope = scope;
    const auto smallest =
        static_cast<int32_t>(Planner::MinSlots(options.num_layers, options.planner.top_k, scope));
    options.num_slots =
        Draw(0, 1) ? smallest : Draw(smallest, options.num_layers * options.num_experts);
    return options;
  }

  std::vector<int64_t> RandomIds() {
    const int32_t num_tokens = Draw(0, 2) ? 1 : Draw(0, kMaxDecodeTokens + 8);
    num_tokens_ = num_tokens;
    std::vector<int64_t> ids(static_cast<size_t>(num_tokens * options_.planner.top_k));
    for (int64_t& id : ids) id = Draw(0, options_.num_experts - 1);
    return ids;
  }

  void PrefetchSome() {
    std::vector<int64_t> ids(static_cast<size_t>(Draw(0, 4)));
    for (int64_t& id : ids) id = Draw(0, options_.num_experts - 1);
    cache_->Prefetch(Draw(0, options_.num_layers - 1), ids, Draw(0, 3));
  }

  // Computes a layer, or part of it. False if an expert could not be loaded.
  bool ComputeLayer(int32_t layer, const std::vector<int64_t>& ids) {
    const Plan& plan = cache_->BeginLayer(layer, ids, num_tokens_);
    num_rows_ += std::ssize(plan.rows);
    const auto num_rows = static_cast<int32_t>(plan.rows.size());
    const int32_t num_computed = Draw(0, 7) ? num_rows : Draw(0, num_rows);
    held_.clear();
    for (int32_t r = 0; r < num_computed; ++r) {
      if (Draw(0, 5) == 0) PrefetchSome();
      ReleaseRowBefore(plan, r);
      const PlanRow& row = plan.rows[static_cast<size_t>(r)];
      try {
        cache_->Wait(r);
      } catch (const TransferError& e) {
        ++num_failures_seen;
        EXPECT_EQ(std::string(e.what()), "cannot load expert " + std::to_string(row.expert) +
                                             " of MoE layer " + std::to_string(layer) +
                                             ": scripted failure");
        return false;
      }
      held_.push_back(r);
      CheckRow(plan, r);
      if (row.next_row == kNoRow && Draw(0, 1)) ReleaseRow(plan, r);
    }
    for (const int32_t r : held_) CheckRow(plan, r);  // whatever was fetched meanwhile
    return true;
  }

  // The row that holds the slot which row `r` waits for, if any.
  void ReleaseRowBefore(const Plan& plan, int32_t r) {
    for (const int32_t held : held_) {
      if (plan.rows[static_cast<size_t>(held)].next_row == r) return ReleaseRow(plan, held);
    }
  }

  void ReleaseRow(const Plan& plan, int32_t r) {
    CheckRow(plan, r);
    std::erase(held_, r);
    cache_->Release(r);
  }

  void CheckRow(const Plan& plan, int32_t r) {
    const PlanRow& row = plan.rows[static_cast<size_t>(r)];
    const ExpertIndex expert{plan.layer * options_.num_experts + row.expert};
    EXPECT_TRUE(source_->Holds(cache_->slot_data(row.slot), expert)) << "wrong bytes in row " << r;
  }

  LayerStatistics Total() const {
    LayerStatistics total;
    for (const LayerStatistics& layer : cache_->statistics()) total += layer;
    return total;
  }

  // Waits for transfers that still run, whose bytes are counted when they end.
  void CheckStatistics() {
    LayerStatistics total = Total();
    for (int i = 0; total.demand_bytes + total.prefetch_bytes != source_->bytes_read(); ++i) {
      ASSERT_LT(i, 10000) << "the bytes do not add up";
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      total = Total();
    }
    EXPECT_EQ(total.hits + total.late_hits + total.misses, num_rows_);
    EXPECT_LE(total.wasted_prefetch_bytes, total.prefetch_bytes);
    EXPECT_GE(total.stall_us, 0.0);
  }

  std::mt19937_64 random_;
  ExpertCacheOptions options_;
  ExpertLayout layout_;
  std::shared_ptr<ScriptedSource> source_;
  std::unique_ptr<ExpertCache> cache_;
  int32_t num_tokens_ = 1;
  int64_t num_rows_ = 0;
  std::vector<int32_t> held_;  // rows waited for and not released
};

int RandomLayers::num_failures_seen = 0;

class ExpertCacheFuzzTest : public testing::TestWithParam<PolicyAndScope> {};

TEST_P(ExpertCacheFuzzTest, NeverAWrongByteNeverAHang) {
  const Watchdog watchdog("the expert cache", std::chrono::seconds(120));
  const auto [policy, scope] = GetParam();
  RandomLayers::num_failures_seen = 0;
  for (uint64_t seed = 0; seed < 120 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    RandomLayers(seed, policy, scope).Run(60);
  }
  EXPECT_GT(RandomLayers::num_failures_seen, 50) << "the test must see failures";
}

INSTANTIATE_TEST_SUITE_P(AllPolicies, ExpertCacheFuzzTest, EveryPolicyAndScope(),
                         NameOfPolicyAndScope);

}  // namespace
}  // namespace expertflow
