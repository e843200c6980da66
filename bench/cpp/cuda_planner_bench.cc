// Time to plan one MoE layer of a decode step on the GPU: 48 layers of 128 experts, top-8, one
// table of 1,536 slots. A graph plans the layers of 64 tokens, one launch each; the time of a layer
// is the graph's over its launches, launch gaps included. `floor_us` is that of a graph of as many
// launches of an empty kernel, measured between those of the planner; a planner may start while the
// one before it ends, an empty kernel does not. Medians.
//
// Routing is uniform or skewed (bench/cpp/routes.h), so that about 25, 50 and 75 % of the experts
// are resident, walks in a circle, so that none is, or stays, so that all are. "to_host" also
// writes the plans to mapped host memory. A policy that learns does so behind every plan, in a
// kernel of its own: `learn_us` is what a graph takes longer that learns twice, with a small kernel
// that has it learn again, and `us_per_layer` the time of the graph without these two.
//
// "PlanPhases" says where the time goes, in clock cycles a layer (see cuda_planner_phases.h):
// `wait` for the kernel before, `ids` until they are known, experts are scored and the slots of
// other layers are ranked, `rank` of the rest, `count` of hits and misses, `select` the victims,
// `finish` the stores. `sum` is all but the wait; what us_per_layer has above it is the end of a
// kernel and the start of the next, and what learns.

#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/plan_phase.h"
#include "core/planner.h"
#include "cuda/cuda_error.h"
#include "cuda/device_memory.h"
#include "cuda/device_planner.h"
#include "cuda/devices.h"
#include "cuda/pinned_memory.h"
#include "cuda/stream.h"
#include "cuda_empty_kernel.h"
#include "cuda_planner_phases.h"
#include "routes.h"

namespace expertflow {
namespace {

constexpr RoutesShape kShape{.num_layers = 48, .num_experts = 128, .top_k = 8, .num_tokens = 64};
constexpr int32_t kNumSlots = 1536;
constexpr int kNumLaunches = kShape.num_layers * kShape.num_tokens;
constexpr int kNumIterations = 20;

// A captured graph, and the time that a launch of it takes.
class TimedGraph {
 public:
  explicit TimedGraph(const std::function<void(cudaStream_t)>& enqueue) {
    EXPERTFLOW_CUDA_CHECK(cudaEventCreate(&begin_));
    EXPERTFLOW_CUDA_CHECK(cudaEventCreate(&end_));
    cudaGraph_t graph;
    EXPERTFLOW_CUDA_CHECK(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeRelaxed));
    enqueue(stream_.get());
    EXPERTFLOW_CUDA_CHECK(cudaStreamEndCapture(stream_.get(), &graph));
    EXPERTFLOW_CUDA_CHECK(cudaGraphInstantiate(&exec_, graph, 0));
    EXPERTFLOW_CUDA_CHECK(cudaGraphDestroy(graph));
    EXPERTFLOW_CUDA_CHECK(cudaGraphUpload(exec_, stream_.get()));
    stream_.Synchronize();
  }
  ~TimedGraph() {
    EXPERTFLOW_CUDA_WARN(cudaGraphExecDestroy(exec_));
    EXPERTFLOW_CUDA_WARN(cudaEventDestroy(begin_));
    EXPERTFLOW_CUDA_WARN(cudaEventDestroy(end_));
  }
  TimedGraph(const TimedGraph&) = delete;
  TimedGraph& operator=(const TimedGraph&) = delete;

  double RunUs() {
    EXPERTFLOW_CUDA_CHECK(cudaEventRecord(begin_, stream_.get()));
    EXPERTFLOW_CUDA_CHECK(cudaGraphLaunch(exec_, stream_.get()));
    EXPERTFLOW_CUDA_CHECK(cudaEventRecord(end_, stream_.get()));
    EXPERTFLOW_CUDA_CHECK(cudaEventSynchronize(end_));
    float elapsed_ms;
    EXPERTFLOW_CUDA_CHECK(cudaEventElapsedTime(&elapsed_ms, begin_, end_));
    return 1000.0 * static_cast<double>(elapsed_ms);
  }

 private:
  CudaStream stream_;
  cudaEvent_t begin_, end_;
  cudaGraphExec_t exec_;
};

double Median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

LayerStatistics Total(const std::vector<LayerStatistics>& layers) {
  LayerStatistics total;
  for (const LayerStatistics& layer : layers) total += layer;
  return total;
}

struct GraphOptions {
  PolicyKind policy;
  bool to_host = false;
  int num_lessons = 1;              // after every plan, if the policy learns
  int64_t* phase_cycles = nullptr;  // if not null, with LaunchTimedPlanLayer
};

// One graph that plans all routes once.
class PlannedRoutes {
 public:
  PlannedRoutes(const Routes& routes, const GraphOptions& options)
      : planner_(kShape.num_layers, kShape.num_experts, kNumSlots,
                 {.top_k = kShape.top_k, .expert_bytes = 1, .policy = options.policy}),
        options_(options),
        ids_(CopyToDevice(routes)),
        host_plan_(options.to_host ? reinterpret_cast<LayerPlan*>(host_memory_.data()) : nullptr),
        graph_([this](cudaStream_t stream) { Enqueue(stream); }) {}

  TimedGraph& graph() { return graph_; }
  LayerStatistics Statistics() const { return Total(planner_.ReadStatistics()); }

 private:
  static DeviceMemory CopyToDevice(const Routes& routes) {
    DeviceMemory ids(sizeof(int64_t) * routes.size(), "routes");
    EXPERTFLOW_CUDA_CHECK(
        cudaMemcpy(ids.data(), routes.data(), ids.num_bytes(), cudaMemcpyHostToDevice));
    EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
    return ids;
  }

  void Enqueue(cudaStream_t stream) {
    const auto* ids = reinterpret_cast<const int64_t*>(ids_.data());
    auto* plan = reinterpret_cast<LayerPlan*>(plan_.data());
    for (int i = 0; i < kNumLaunches; ++i) {
      const int32_t layer = i % kShape.num_layers;
      const RoutedIds routed{ids + i * kShape.top_k, nullptr, kShape.top_k};
      if (options_.phase_cycles == nullptr) {
        planner_.PlanLayer(layer, routed, plan, host_plan_, MissFetch::kSameStream, stream);
      } else {
        LaunchTimedPlanLayer(planner_.planning(),
                             {.layer = layer,
                              .ids = routed,
                              .fetch = MissFetch::kSameStream,
                              .clock = planner_.clock(),
                              .plan = plan,
                              .host_plan = nullptr},
                             options_.phase_cycles, stream);
      }
      if (options_.policy == PolicyKind::kPredictedNeed) Learn(layer, stream);
    }
  }

  void Learn(int32_t layer, cudaStream_t stream) {
    for (int i = 0; i < options_.num_lessons; ++i) {
      LaunchLearnAgain(planner_.planning(), layer, stream);
      planner_.Learn(layer, stream);
    }
  }

  DevicePlanner planner_;
  GraphOptions options_;
  DeviceMemory ids_;
  DeviceMemory plan_{sizeof(LayerPlan), "a plan"};
  PinnedMemory host_memory_{sizeof(LayerPlan)};
  LayerPlan* host_plan_;
  TimedGraph graph_;
};

void PlanLayer(benchmark::State& state, const Routes& routes, const GraphOptions& options) {
  PlannedRoutes planned(routes, options);
  TimedGraph empty([](cudaStream_t stream) {
    for (int i = 0; i < kNumLaunches; ++i) LaunchEmptyKernel(stream);
  });
  std::optional<PlannedRoutes> learns_twice;
  if (options.policy == PolicyKind::kPredictedNeed) {
    GraphOptions twice = options;
    twice.num_lessons = 2;
    learns_twice.emplace(routes, twice);
  }
  for (int i = 0; i < 3; ++i) {
    planned.graph().RunUs();
    if (learns_twice) learns_twice->graph().RunUs();
  }
  const LayerStatistics before = planned.Statistics();
  std::vector<double> planner_us, learn_us, floor_us;
  for (auto _ : state) {
    floor_us.push_back(empty.RunUs() / kNumLaunches);
    const double graph_us = planned.graph().RunUs();
    const double twice_us = learns_twice ? learns_twice->graph().RunUs() : graph_us;
    learn_us.push_back((twice_us - graph_us) / kNumLaunches);
    planner_us.push_back(graph_us / kNumLaunches - learn_us.back());
    state.SetIterationTime(graph_us * 1e-6);
  }
  const LayerStatistics after = planned.Statistics();
  const auto hits = static_cast<double>(after.hits - before.hits);
  const auto misses = static_cast<double>(after.misses - before.misses);
  state.counters["us_per_layer"] = Median(planner_us);
  state.counters["min_us"] = *std::ranges::min_element(planner_us);
  state.counters["max_us"] = *std::ranges::max_element(planner_us);
  state.counters["floor_us"] = Median(floor_us);
  if (learns_twice) state.counters["learn_us"] = Median(learn_us);
  state.counters["hit_rate"] = hits / (hits + misses);
}

using PhaseCycles = std::array<int64_t, kNumPlanPhases>;

void PlanPhases(benchmark::State& state, const Routes& routes, PolicyKind policy) {
  DeviceMemory memory(sizeof(PhaseCycles), "phases");
  auto* in_memory = reinterpret_cast<int64_t*>(memory.data());
  PlannedRoutes planned(routes, {.policy = policy, .phase_cycles = in_memory});
  for (int i = 0; i < 3; ++i) planned.graph().RunUs();
  PhaseCycles cycles{};
  EXPERTFLOW_CUDA_CHECK(cudaMemcpy(in_memory, cycles.data(), sizeof cycles, cudaMemcpyDefault));
  std::vector<double> us;
  for (auto _ : state) {
    us.push_back(planned.graph().RunUs() / kNumLaunches);
    state.SetIterationTime(us.back() * kNumLaunches * 1e-6);
  }
  EXPERTFLOW_CUDA_CHECK(cudaMemcpy(cycles.data(), in_memory, sizeof cycles, cudaMemcpyDefault));
  const auto mean = [&](PlanPhase phase) {
    return static_cast<double>(cycles[static_cast<size_t>(phase)]) / kNumLaunches /
           static_cast<double>(us.size());
  };
  static constexpr struct {
    const char* name;
    PlanPhase phase;
  } kPhases[] = {{"1_ids", PlanPhase::kRouted},
                 {"2_rank", PlanPhase::kRanked},
                 {"3_count", PlanPhase::kCounted},
                 {"4_select", PlanPhase::kSelected},
                 {"5_finish", PlanPhase::kDone}};
  double sum = 0.0;
  state.counters["0_wait"] = mean(PlanPhase::kReleased);
  for (const auto& [name, phase] : kPhases) {
    state.counters[name] = mean(phase);
    sum += mean(phase);
  }
  state.counters["6_sum"] = sum;
  state.counters["us_per_layer"] = Median(us);
}

// Every token as the first one.
Routes StayingRoutes() {
  RoutesShape one_token = kShape;
  one_token.num_tokens = 1;
  const Routes first = SkewedRoutes(one_token, 0.0, 0.0);
  Routes routes;
  for (int32_t token = 0; token < kShape.num_tokens; ++token) {
    routes.insert(routes.end(), first.begin(), first.end());
  }
  return routes;
}

void RegisterAll() {
  const GpuList list = ListGpus();
  if (list.gpus.empty()) {
    std::printf("cuda_planner_bench: no GPU: %s\n", list.missing_reason.c_str());
    return;
  }
  std::printf("cuda_planner_bench: %s\n", list.gpus.front().name.c_str());
  static const struct {
    const char* name;
    Routes routes;
  } routings[] = {{"uniform", SkewedRoutes(kShape, 0.0, 0.0)},
                  {"skewed", SkewedRoutes(kShape, 0.4, 0.3)},
                  {"very_skewed", SkewedRoutes(kShape, 0.8, 0.5)},
                  {"all_misses", CircularRoutes(kShape)},
                  {"all_hits", StayingRoutes()}};
  const auto set_up = [](benchmark::internal::Benchmark* benchmark) {
    benchmark->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(kNumIterations);
  };
  for (const auto& routing : routings) {
    for (const std::string& policy : PolicyNames()) {
      const PolicyKind kind = ParsePolicy(policy);
      const std::string row = std::string(routing.name) + "/" + policy;
      const auto add = [&](const char* suffix, const GraphOptions& options) {
        const std::string name = "PlanLayerOnGpu/" + row + suffix;
        set_up(benchmark::RegisterBenchmark(name.c_str(), PlanLayer, routing.routes, options));
      };
      add("", {.policy = kind});
      add("/to_host", {.policy = kind, .to_host = true});
      set_up(benchmark::RegisterBenchmark(("PlanPhases/" + row).c_str(), PlanPhases, routing.routes,
                                          kind));
    }
  }
}

// Registered while the program starts: benchmark_main runs what is there by then.
[[maybe_unused]] const bool kRegistered = [] {
  RegisterAll();
  return true;
}();

}  // namespace
}  // namespace expertflow
