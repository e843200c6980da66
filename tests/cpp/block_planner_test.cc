// The body of the planner kernel, run on threads of the CPU: plans and tables equal the host
// planner's, step by step.

#include "core/block_planner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/block_need_learner.h"
#include "every_policy.h"
#include "host_block.h"
#include "paired_planners.h"
#include "recorded_routing.h"

namespace expertflow {
namespace {

constexpr int32_t kNumThreads = 32;

// The state of the need model on blocks, in host memory.
class HostNeedState {
 public:
  HostNeedState(const Shape& shape)
      : arrays_(shape.num_layers, shape.num_experts, shape.top_k, shape.num_slots),
        latest_count_(static_cast<size_t>(shape.num_layers)),
        latest_(static_cast<size_t>(shape.num_layers * shape.num_experts)),
        ahead_(static_cast<size_t>(shape.num_experts)),
        observed_(static_cast<size_t>(shape.num_experts)) {}

  BlockNeedState view() {
    return {arrays_.state(), latest_count_.data(), latest_.data(),
            ahead_.data(),   observed_.data(),     &outcome_};
  }

  // Does `change`, and keeps what was there before.
  template <class Change>
  void Write(const Change& change) {
    other_ = Everything();
    change();
  }

  // Takes back what the last Write changed, or does it again.
  void Exchange() {
    if (other_.empty()) return;
    std::vector<std::byte> current = Everything();
    auto from = other_.cbegin();
    ForEach([&](auto* array, size_t num_bytes) {
      std::copy_n(from, num_bytes, reinterpret_cast<std::byte*>(array));
      from += static_cast<ptrdiff_t>(num_bytes);
    });
    other_ = std::move(current);
  }

 private:
  // Calls visit(array, its bytes) for all of the need state that kernels write.
  template <class Visit>
  void ForEach(const Visit& visit) {
    NeedState state = arrays_.state();
    NeedArrays::ForEach(state, [&]<class T>(T* array, size_t num_bytes) {
      if constexpr (!std::is_const_v<T>) visit(array, num_bytes);
    });
    visit(latest_count_.data(), latest_count_.size() * sizeof latest_count_[0]);
    visit(latest_.data(), latest_.size() * sizeof latest_[0]);
    visit(ahead_.data(), ahead_.size() * sizeof ahead_[0]);
    visit(observed_.data(), observed_.size() * sizeof observed_[0]);
    visit(&outcome_, sizeof outcome_);
  }

  std::vector<std::byte> Everything() {
    std::vector<std::byte> bytes;
    ForEach([&](const auto* array, size_t num_bytes) {
      const auto* first = reinterpret_cast<const std::byte*>(array);
      bytes.insert(bytes.end(), first, first + num_bytes);
    });
    return bytes;
  }

  NeedArrays arrays_;
  std::vector<int32_t> latest_count_;
  std::vector<int32_t> latest_;
  std::vector<NeedAhead> ahead_;
  std::vector<NeedObserved> observed_;
  NeedOutcome outcome_;
  std::vector<std::byte> other_;  // Everything() as it was before the last change, or after
};

// The planner kernel on the CPU, with a table of its own.
class CpuBlockPlanner {
 public:
  CpuBlockPlanner(const Shape& shape, const PlannerConfig& config)
      : table_(shape.num_layers, shape.num_experts, shape.num_slots),
        statistics_(static_cast<size_t>(shape.num_layers)),
        need_(shape),
        planning_(MakePlanningView(config, table_.view(), log2_table_.data(), statistics_.data())) {
    planning_.need = need_.view();
  }

  const LayerPlan& PlanLayer(int32_t layer, const std::vector<int64_t>& ids, MissFetch fetch) {
    const std::vector<int32_t> narrow_ids(ids.begin(), ids.end());
    const bool narrow = clock_.sequence % 2 == 1;
    const LayerPlanRequest request{.layer = layer,
                                   .ids = {.int64 = narrow ? nullptr : ids.data(),
                                           .int32 = narrow ? narrow_ids.data() : nullptr,
                                           .count = static_cast<int32_t>(ids.size())},
                                   .fetch = fetch,
                                   .clock = &clock_,
                                   .plan = &plan_,
                                   .host_plan = &host_plan_};
    WithPolicy(planning_.policy, [&]<class Policy>(Policy) {
      int32_t* words = SharedWords(NumPlannerWords(planning_));
      const int32_t num_threads = NumThreads(request.ids.count);
      const bool is_one_tile = IsOneTile(planning_, layer, num_threads);
      // The last lesson may still run when the plan begins, or have ended.
      const bool still_learns =
          planning_.policy == PolicyKind::kPredictedNeed && clock_.sequence % 3 > 0;
      std::function<void()> end_lesson;
      if (still_learns) {
        need_.Exchange();
        end_lesson = [this] { need_.Exchange(); };
      }
      RunHostBlock(
          num_threads,
          [&](HostBlock& block) {
            const auto run = [&]<bool kOneTile>(std::bool_constant<kOneTile>) {
              BlockPlanner<Policy, HostBlock, kOneTile>(block, *shared_, words, planning_, request)
                  .Run();
            };
            is_one_tile ? run(std::true_type()) : run(std::false_type());
          },
          end_lesson);
    });
    ExpectEqualPlans(host_plan_, plan_);
    if (planning_.policy == PolicyKind::kPredictedNeed) Learn(layer);
    return host_plan_;
  }

  void CopyTableTo(SlotTable& to) { CopyTable(table_.view(), to.view()); }
  void CopyTableFrom(const SlotTable& from) { CopyTable(from.view(), table_.view()); }
  std::vector<LayerStatistics> Statistics() const { return statistics_; }
  void SetTick(Tick now) { clock_.now = now; }
  Tick now() const { return clock_.now; }

 private:
  void Learn(int32_t layer) {
    const NeedState& model = planning_.need.model;
    int32_t* words = SharedWords(NumLearnerWords(model.num_experts, model.width));
    BlockLearnerShared shared;
    need_.Write([&] {
      RunHostBlock(kNumThreads, [&](HostBlock& block) {
        BlockNeedLearner<HostBlock>(block, shared, words, planning_.need,
                                    planning_.table.expert_key, layer)
            .Learn();
      });
    });
  }

  int32_t* SharedWords(int32_t num_words) {
    words_.resize(static_cast<size_t>(num_words));  // memory is aligned to 16 bytes
    return words_.data();
  }

  static int32_t NumThreads(int32_t num_ids) {
    constexpr int32_t kWarpSize = HostBlock::kWarpSize;
    return std::max((num_ids + kWarpSize - 1) / kWarpSize * kWarpSize, kNumThreads);
  }

  SlotTable table_;
  std::vector<LayerStatistics> statistics_;
  HostNeedState need_;
  std::vector<int32_t> words_;
  DecayedFrequency::Log2Table log2_table_ = DecayedFrequency::MakeLog2Table();
  PlanningView planning_;
  std::unique_ptr<BlockPlannerShared> shared_ = std::make_unique<BlockPlannerShared>();
  PlanClock clock_{0, 0};
  LayerPlan plan_{};
  LayerPlan host_plan_{};
};

class BlockPlannerTest : public testing::TestWithParam<PolicyAndScope> {};

TEST_P(BlockPlannerTest, DecidesAsTheHostPlannerDoes) {
  const auto [policy, scope] = GetParam();
  for (uint64_t seed = 0; seed < 5 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    PairedPlanners<CpuBlockPlanner>(seed, policy, scope).RunRandom(30);
  }
}

TEST_P(BlockPlannerTest, DecidesAlikeOnSkewedRouting) {
  const auto [policy, scope] = GetParam();
  PairedPlanners<CpuBlockPlanner>(Shape{3, 32, 4, 30}, policy, scope).RunSkewed(25);
}

TEST_P(BlockPlannerTest, DecidesAlikeOnRecordedRouting) {
  const auto [policy, scope] = GetParam();
  ExpectEqualOnRecordedRouting<CpuBlockPlanner>(policy, scope, /*num_tokens=*/20);
}

TEST(BlockPlannerRefusalTest, IdsThatTheLayerLacksChangeNothing) {
  for (const std::string& policy : PolicyNames()) {
    SCOPED_TRACE(policy);
    ExpectBadIdsAreRefused<CpuBlockPlanner>(ParsePolicy(policy));
  }
}

INSTANTIATE_TEST_SUITE_P(AllPolicies, BlockPlannerTest, EveryPolicyAndScope(),
                         NameOfPolicyAndScope);

}  // namespace
}  // namespace expertflow
