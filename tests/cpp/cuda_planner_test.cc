// The planner kernel against the host planner, and in captured graphs.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cuda/cuda_error.h"
#include "cuda/device_memory.h"
#include "cuda/device_planner.h"
#include "cuda/mapped_word.h"
#include "cuda/pinned_memory.h"
#include "cuda/planner_kernel.h"
#include "cuda/stream.h"
#include "cuda_test.h"
#include "every_policy.h"
#include "paired_planners.h"
#include "recorded_routing.h"

namespace expertflow {
namespace {

// Routed ids in device memory, 64 or 32 bits wide.
class DeviceIds {
 public:
  DeviceIds() : memory_(sizeof(int64_t) * kMaxRoutedIds, "ids") {}

  RoutedIds Put(const std::vector<int64_t>& ids, bool narrow) {
    const auto count = static_cast<int32_t>(ids.size());
    if (!narrow) {
      CopyIn(ids.data(), ids.size() * sizeof(int64_t));
      return {reinterpret_cast<const int64_t*>(memory_.data()), nullptr, count};
    }
    const std::vector<int32_t> narrow_ids(ids.begin(), ids.end());
    CopyIn(narrow_ids.data(), narrow_ids.size() * sizeof(int32_t));
    return {nullptr, reinterpret_cast<const int32_t*>(memory_.data()), count};
  }

 private:
  void CopyIn(const void* from, size_t num_bytes) {
    EXPERTFLOW_CUDA_CHECK(cudaMemcpy(memory_.data(), from, num_bytes, cudaMemcpyHostToDevice));
    EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
  }

  DeviceMemory memory_;
};

LayerPlan CopyOut(const DeviceMemory& plan) {
  LayerPlan copy;
  EXPERTFLOW_CUDA_CHECK(cudaMemcpy(&copy, plan.data(), sizeof copy, cudaMemcpyDeviceToHost));
  return copy;
}

// What PairedPlanners drives. Takes each plan from mapped host memory as soon as its sequence
// number is there, as the streamed path does, and compares it with the one in device memory.
class GpuPlanner {
 public:
  GpuPlanner(const Shape& shape, const PlannerConfig& config)
      : planner_(shape.num_layers, shape.num_experts, shape.num_slots, config) {
    host_plan_ = new (host_memory_.data()) LayerPlan{};
  }

  const LayerPlan& PlanLayer(int32_t layer, const std::vector<int64_t>& ids, MissFetch fetch) {
    const RoutedIds routed = ids_.Put(ids, /*narrow=*/sequence_ % 2 == 1);
    planner_.PlanLayer(layer, routed, reinterpret_cast<LayerPlan*>(plan_.data()), host_plan_, fetch,
                       stream_.get());
    planner_.Learn(layer, stream_.get());
    ++sequence_;
    AwaitWord(host_plan_->sequence, sequence_, stream_.get(), "a plan");
    const LayerPlan early = *host_plan_;
    stream_.Synchronize();
    ExpectEqualPlans(early, CopyOut(plan_));
    return *host_plan_;
  }

  void CopyTableTo(SlotTable& to) { planner_.table().CopyTo(to); }
  void CopyTableFrom(const SlotTable& from) { planner_.table().CopyFrom(from); }
  std::vector<LayerStatistics> Statistics() const { return planner_.ReadStatistics(); }
  void SetTick(Tick now) { planner_.SetTick(now); }
  Tick now() const { return planner_.ReadClock().now; }

 private:
  DevicePlanner planner_;
  CudaStream stream_;
  DeviceIds ids_;
  DeviceMemory plan_{sizeof(LayerPlan), "a plan"};
  PinnedMemory host_memory_{sizeof(LayerPlan)};
  LayerPlan* host_plan_;
  uint64_t sequence_ = 0;
};

class PlannerKernelTest : public CudaTest, public testing::WithParamInterface<PolicyAndScope> {};

TEST_P(PlannerKernelTest, DecidesAsTheHostPlannerDoes) {
  const auto [policy, scope] = GetParam();
  for (uint64_t seed = 0; seed < 40 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    PairedPlanners<GpuPlanner>(seed, policy, scope).RunRandom(50);
  }
}

TEST_P(PlannerKernelTest, DecidesAlikeOnSkewedRoutingOfLargeModels) {
  const auto [policy, scope] = GetParam();
  for (const Shape shape :
       {Shape{48, 128, 8, 1536}, Shape{24, 32, 4, 192}, Shape{26, 64, 6, 832}}) {
    PairedPlanners<GpuPlanner>(shape, policy, scope).RunSkewed(20);
  }
}

// Several tiles of slots for a thread.
TEST_P(PlannerKernelTest, DecidesAlikeOnTablesOfManySlots) {
  const auto [policy, scope] = GetParam();
  PairedPlanners<GpuPlanner>(Shape{12, 512, 10, 5000}, policy, scope).RunSkewed(30);
  PairedPlanners<GpuPlanner>(Shape{3, 256, 8, 700}, policy, scope).RunRandom(60);
}

TEST_P(PlannerKernelTest, DecidesAlikeForAsManyIdsAsItMay) {
  const auto [policy, scope] = GetParam();
  PairedPlanners<GpuPlanner>(Shape{2, 512, kMaxRoutedIds / kMaxDecodeTokens, 1000}, policy, scope)
      .RunRandom(60);
}

TEST_P(PlannerKernelTest, DecidesAlikeOnRecordedRouting) {
  const auto [policy, scope] = GetParam();
  ExpectEqualOnRecordedRouting<GpuPlanner>(policy, scope, /*num_tokens=*/200);
}

INSTANTIATE_TEST_SUITE_P(AllPolicies, PlannerKernelTest, EveryPolicyAndScope(),
                         NameOfPolicyAndScope);

// A few plans of every kind: quick also under compute-sanitizer, where a plan takes tens of
// milliseconds.
using PlannerKernelSmallTest = PlannerKernelTest;

TEST_P(PlannerKernelSmallTest, DecidesAsTheHostPlannerDoes) {
  const auto [policy, scope] = GetParam();
  for (uint64_t seed = 0; seed < 6 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    PairedPlanners<GpuPlanner>(seed, policy, scope).RunRandom(6);
  }
  PairedPlanners<GpuPlanner>(Shape{3, 32, 4, 48}, policy, scope).RunSkewed(8);
  PairedPlanners<GpuPlanner>(Shape{10, 512, 8, 5000}, policy, scope).RunRandom(10);
}

INSTANTIATE_TEST_SUITE_P(AllPolicies, PlannerKernelSmallTest, EveryPolicyAndScope(),
                         NameOfPolicyAndScope);

using PlannerKernelRefusalTest = CudaTest;

TEST_F(PlannerKernelRefusalTest, IdsThatTheLayerLacksChangeNothing) {
  for (const std::string& policy : PolicyNames()) {
    SCOPED_TRACE(policy);
    ExpectBadIdsAreRefused<GpuPlanner>(ParsePolicy(policy));
  }
}

TEST_F(PlannerKernelRefusalTest, WhatDoesNotFitTheKernelIsAnError) {
  const PlannerConfig config{.top_k = 2, .expert_bytes = 1};
  DevicePlanner planner(2, 8, 6, config);
  DeviceIds ids;
  DeviceMemory plan(sizeof(LayerPlan), "a plan");
  const auto enqueue = [&](int32_t layer, int32_t num_ids) {
    RoutedIds routed = ids.Put({1, 2}, false);
    routed.count = num_ids;
    planner.PlanLayer(layer, routed, reinterpret_cast<LayerPlan*>(plan.data()), nullptr,
                      MissFetch::kTransfer, nullptr);
  };
  EXPECT_THROW(enqueue(2, 2), std::invalid_argument);
  EXPECT_THROW(enqueue(-1, 2), std::invalid_argument);
  EXPECT_THROW(enqueue(0, kMaxRoutedIds + 1), std::invalid_argument);
  EXPECT_THROW(enqueue(0, 3), std::invalid_argument) << "not whole tokens";
  EXPECT_THROW(enqueue(0, 2 * (kMaxDecodeTokens + 1)), std::invalid_argument) << "a prompt";
  EXPECT_THROW(DevicePlanner(2, 8, 1, config), std::invalid_argument);
  EXPECT_THROW(LaunchLearnNeeds(planner.planning(), 2, nullptr), std::invalid_argument);
  EXPECT_THROW(LaunchLearnNeeds(planner.planning(), 0, nullptr), std::invalid_argument);
  DevicePlanner many_experts(1, 20'000, 16, config);
  EXPECT_THROW(
      many_experts.PlanLayer(0, ids.Put({1, 2}, false), reinterpret_cast<LayerPlan*>(plan.data()),
                             nullptr, MissFetch::kTransfer, nullptr),
      std::invalid_argument);
}

TEST_F(PlannerKernelRefusalTest, APlanThatNothingWasLearnedFromIsTheLast) {
  const PlannerConfig config{.top_k = 2, .expert_bytes = 1, .policy = PolicyKind::kPredictedNeed};
  DevicePlanner planner(2, 8, 6, config);
  DeviceIds ids;
  DeviceMemory plan(sizeof(LayerPlan), "a plan");
  const auto enqueue = [&](int32_t layer) {
    planner.PlanLayer(layer, ids.Put({1, 2}, false), reinterpret_cast<LayerPlan*>(plan.data()),
                      nullptr, MissFetch::kTransfer, nullptr);
  };
  enqueue(0);
  EXPECT_THROW(enqueue(1), std::logic_error);
  planner.Learn(0, nullptr);
  EXPECT_NO_THROW(enqueue(1));
}

TEST_F(PlannerKernelRefusalTest, OnlyTheLayerThatWasPlannedIsLearnedFrom) {
  const PlannerConfig config{.top_k = 2, .expert_bytes = 1, .policy = PolicyKind::kPredictedNeed};
  DevicePlanner planner(2, 8, 6, config);
  DeviceIds ids;
  DeviceMemory plan(sizeof(LayerPlan), "a plan");
  planner.PlanLayer(0, ids.Put({1, 2}, false), reinterpret_cast<LayerPlan*>(plan.data()), nullptr,
                    MissFetch::kTransfer, nullptr);
  EXPECT_THROW(planner.Learn(1, nullptr), std::logic_error);
  EXPECT_NO_THROW(planner.Learn(0, nullptr)) << "the record was lost";
}

struct DestroyGraph {
  void operator()(cudaGraph_t graph) const { EXPERTFLOW_CUDA_WARN(cudaGraphDestroy(graph)); }
  void operator()(cudaGraphExec_t graph) const {
    EXPERTFLOW_CUDA_WARN(cudaGraphExecDestroy(graph));
  }
};
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, DestroyGraph>;
using GraphExec = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, DestroyGraph>;

template <class Enqueue>
GraphExec Capture(const CudaStream& stream, const Enqueue& enqueue) {
  cudaGraph_t graph;
  EXPERTFLOW_CUDA_CHECK(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal));
  enqueue();
  EXPERTFLOW_CUDA_CHECK(cudaStreamEndCapture(stream.get(), &graph));
  const Graph captured(graph);
  cudaGraphExec_t exec;
  EXPERTFLOW_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  return GraphExec(exec);
}

// The ids of a layer each, in memory that graphs read.
class StepIds {
 public:
  explicit StepIds(const Shape& shape)
      : shape_(shape), ids_(static_cast<size_t>(shape.num_layers)) {
    Draw();
  }

  void Draw() {
    routed_.clear();
    for (DeviceIds& of_layer : ids_) {
      std::vector<int64_t> values(static_cast<size_t>(shape_.top_k));
      for (int64_t& id : values) id = static_cast<int64_t>(random_() % Experts());
      routed_.push_back(of_layer.Put(values, false));
    }
  }

  const RoutedIds& of_layer(int32_t layer) const { return routed_[static_cast<size_t>(layer)]; }

 private:
  uint64_t Experts() const { return static_cast<uint64_t>(shape_.num_experts); }

  const Shape shape_;
  std::vector<DeviceIds> ids_;
  std::vector<RoutedIds> routed_;
  std::mt19937_64 random_{1};
};

DevicePlanner MakePlanner(const Shape& shape, PolicyKind policy) {
  const PlannerConfig config{.top_k = shape.top_k, .expert_bytes = 1, .policy = policy};
  return {shape.num_layers, shape.num_experts, shape.num_slots, config};
}

// Plans and learns on a stream of its own.
struct PlanningStream {
  void PlanLayer(DevicePlanner& planner, int32_t layer, const StepIds& ids,
                 LayerPlan* host_plan = nullptr) {
    planner.PlanLayer(layer, ids.of_layer(layer), reinterpret_cast<LayerPlan*>(plan.data()),
                      host_plan, MissFetch::kSameStream, stream.get());
    planner.Learn(layer, stream.get());
  }

  CudaStream stream;
  DeviceMemory plan{sizeof(LayerPlan), "a plan"};
  PinnedMemory host_memory{sizeof(LayerPlan)};
};

void ExpectReplaysDecideAsSingleLaunches(const Shape& shape, PolicyKind policy, int num_tokens) {
  DevicePlanner replayed = MakePlanner(shape, policy);
  DevicePlanner launched = MakePlanner(shape, policy);
  StepIds ids(shape);
  PlanningStream on;
  auto* host_plan = new (on.host_memory.data()) LayerPlan{};
  const GraphExec step = Capture(on.stream, [&] {
    for (int32_t layer = 0; layer < shape.num_layers; ++layer) {
      const bool is_last = layer == shape.num_layers - 1;
      on.PlanLayer(replayed, layer, ids, is_last ? host_plan : nullptr);
    }
  });
  SlotTable of_replayed(shape.num_layers, shape.num_experts, shape.num_slots);
  SlotTable of_launched(shape.num_layers, shape.num_experts, shape.num_slots);
  for (int token = 0; token < num_tokens; ++token) {
    SCOPED_TRACE("token " + std::to_string(token));
    EXPERTFLOW_CUDA_CHECK(cudaGraphLaunch(step.get(), on.stream.get()));
    on.stream.Synchronize();
    const LayerPlan last_replayed = CopyOut(on.plan);
    ExpectEqualPlans(*host_plan, last_replayed);
    for (int32_t layer = 0; layer < shape.num_layers; ++layer) {
      on.PlanLayer(launched, layer, ids);
      on.stream.Synchronize();
    }
    ExpectEqualPlans(last_replayed, CopyOut(on.plan));
    replayed.table().CopyTo(of_replayed);
    launched.table().CopyTo(of_launched);
    ExpectEqualTables(of_replayed.view(), of_launched.view());
    EXPECT_EQ(replayed.ReadClock().now, (token + 1) * shape.num_layers);
    if (testing::Test::HasFailure()) return;
    ids.Draw();
  }
}

// A policy, and how many tokens.
class PlannerKernelGraphTest : public CudaTest,
                               public testing::WithParamInterface<std::tuple<PolicyKind, int>> {};

// A graph of one decode step, replayed with other ids in the same memory, where a launch may start
// before the one ahead has ended, decides as launches one by one do, and every replay has its own
// ticks.
TEST_P(PlannerKernelGraphTest, ReplaysDecideAsSingleLaunches) {
  const auto [policy, num_tokens] = GetParam();
  for (const Shape shape :
       {Shape{6, 32, 4, 40}, Shape{1, 32, 4, 12}, Shape{2, 32, 4, 20}, Shape{2, 176, 8, 100}}) {
    SCOPED_TRACE(std::to_string(shape.num_layers) + " x " + std::to_string(shape.num_experts));
    ExpectReplaysDecideAsSingleLaunches(shape, policy, num_tokens);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Policies, PlannerKernelGraphTest,
    testing::Combine(testing::Values(PolicyKind::kLru, PolicyKind::kDecayedFrequency,
                                     PolicyKind::kTwoLevelLru, PolicyKind::kOnDemand,
                                     PolicyKind::kPredictedNeed),
                     testing::Values(40)));
INSTANTIATE_TEST_SUITE_P(Small, PlannerKernelGraphTest,
                         testing::Combine(testing::Values(PolicyKind::kDecayedFrequency,
                                                          PolicyKind::kPredictedNeed),
                                          testing::Values(6)));

using PlannerKernelThreadsTest = CudaTest;

// Of one kernel, with as much shared memory as either needs.
TEST_F(PlannerKernelThreadsTest, PlannersOfDifferentSizesPlanAtOnce) {
  constexpr int kNumPlans = 2000;
  const auto plan_many = [](const Shape& shape) {
    DevicePlanner planner = MakePlanner(shape, PolicyKind::kPredictedNeed);
    const StepIds ids(shape);
    PlanningStream on;
    for (int i = 0; i < kNumPlans; ++i) on.PlanLayer(planner, 0, ids);
    on.stream.Synchronize();
    return planner.ReadClock().now;
  };
  auto large = std::async(std::launch::async, plan_many, Shape{1, 128, 8, 100});
  auto small = std::async(std::launch::async, plan_many, Shape{1, 8, 2, 8});
  EXPECT_EQ(large.get(), kNumPlans);
  EXPECT_EQ(small.get(), kNumPlans);
}

}  // namespace
}  // namespace expertflow
