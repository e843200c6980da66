// Time to plan one MoE layer of a decode step in steady state, on the two tables of a model with
// 48 layers of 128 experts, top-8: a quota of 64 slots a layer, and 1,536 slots for all layers.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/planner.h"
#include "routes.h"

namespace expertflow {
namespace {

constexpr int32_t kNumLayers = 48;
constexpr int32_t kNumExperts = 128;
constexpr int32_t kTopK = 8;
constexpr int32_t kNumTokens = 512;
constexpr RoutesShape kShape{kNumLayers, kNumExperts, kTopK, kNumTokens};
constexpr double kStickiness = 0.5;
constexpr double kZipfExponent = 0.8;

// Plans the routes over and over, one layer with each call.
class Decoder {
 public:
  Decoder(const Routes& routes, PolicyKind policy, CacheScope scope, int32_t num_slots)
      : routes_(routes),
        table_(kNumLayers, kNumExperts, num_slots),
        planner_(table_, {.top_k = kTopK, .expert_bytes = 1, .policy = policy, .scope = scope}) {}

  void PlanNextLayer() {
    const auto layer = static_cast<int32_t>(step_ % kNumLayers);
    const std::span<const int64_t> ids(routes_.data() + step_ * kTopK, kTopK);
    const Plan* plan = planner_.PlanLayer(layer, ids, 1, now_++);
    for (const PlanRow& row : plan->rows) {
      if (row.state == RowState::kMiss) planner_.Publish(row.slot);
    }
    if (++step_ == routes_.size() / kTopK) step_ = 0;
  }

  void PlanAllTokens() {
    for (int32_t i = 0; i < kNumTokens * kNumLayers; ++i) PlanNextLayer();
  }

  LayerStatistics TakeStatistics() {
    LayerStatistics total;
    for (const LayerStatistics& layer : planner_.statistics()) total += layer;
    planner_.ResetStatistics();
    return total;
  }

 private:
  const Routes& routes_;
  SlotTable table_;
  Planner planner_;
  size_t step_ = 0;
  Tick now_ = 1;
};

void PlanLayer(benchmark::State& state, const Routes& routes, PolicyKind policy, CacheScope scope,
               int32_t num_slots) {
  Decoder decoder(routes, policy, scope, num_slots);
  decoder.PlanAllTokens();
  decoder.TakeStatistics();
  for (auto _ : state) decoder.PlanNextLayer();
  const LayerStatistics counts = decoder.TakeStatistics();
  const auto num_plans = static_cast<double>(state.iterations());
  state.counters["hit_rate"] = static_cast<double>(counts.hits) / (num_plans * kTopK);
  state.counters["misses_per_plan"] = static_cast<double>(counts.misses) / num_plans;
}

double Min(const std::vector<double>& values) { return *std::ranges::min_element(values); }

void RegisterAll(const std::string& routing, const Routes& routes) {
  const struct {
    const char* name;
    CacheScope scope;
    int32_t num_slots;
  } tables[] = {{"quota_64_of_128", CacheScope::kLayer, kNumLayers * 64},
                {"global_1536_of_6144", CacheScope::kGlobal, 1536}};
  for (const auto& table : tables) {
    for (const std::string& policy : PolicyNames()) {
      const std::string name = "PlanLayer/" + routing + "/" + table.name + "/" + policy;
      benchmark::RegisterBenchmark(name.c_str(), PlanLayer, routes, ParsePolicy(policy),
                                   table.scope, table.num_slots)
          ->MinTime(0.1)
          ->Repetitions(9)
          ->ReportAggregatesOnly()
          ->ComputeStatistics("min", Min);
    }
  }
}

// Registered while the program starts: benchmark_main runs what is there by then.
[[maybe_unused]] const bool kRegistered = [] {
  static const Routes skewed = SkewedRoutes(kShape, kZipfExponent, kStickiness);
  static const Routes circular = CircularRoutes(kShape);
  RegisterAll("skewed", skewed);
  RegisterAll("all_misses", circular);
  return true;
}();

}  // namespace
}  // namespace expertflow
