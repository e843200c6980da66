// Time to plan one MoE layer of a decode step in steady state, on the two tables of a model with
// 48 layers of 128 experts, top-8: a quota of 64 slots a layer, and 1,536 slots for all layers.
//
// Routing is Markov and skewed: a token keeps each expert of the token before with probability
// kStickiness, and draws the others from a Zipf distribution over the layer's own order of experts.
// The worst case walks through the experts of a layer in a circle, so every one of them misses.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "core/planner.h"

namespace expertflow {
namespace {

constexpr int32_t kNumLayers = 48;
constexpr int32_t kNumExperts = 128;
constexpr int32_t kTopK = 8;
constexpr int32_t kNumTokens = 512;
constexpr double kStickiness = 0.5;
constexpr double kZipfExponent = 0.8;

// Expert ids [token][layer][top_k].
using Routes = std::vector<int64_t>;

bool Contains(std::span<const int64_t> ids, int64_t id) {
  return std::ranges::find(ids, id) != ids.end();
}

Routes SkewedRoutes() {
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> uniform;
  std::vector<double> weights(kNumExperts);
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i] = std::pow(static_cast<double>(i + 1), -kZipfExponent);
  }
  std::discrete_distribution<size_t> zipf(weights.begin(), weights.end());
  std::vector<std::vector<int64_t>> order(kNumLayers, std::vector<int64_t>(kNumExperts));
  for (auto& of_layer : order) {
    std::iota(of_layer.begin(), of_layer.end(), 0);
    std::shuffle(of_layer.begin(), of_layer.end(), random);
  }
  Routes routes;
  constexpr size_t kPerToken = kNumLayers * kTopK;
  for (size_t token = 0; token < kNumTokens; ++token) {
    for (size_t layer = 0; layer < kNumLayers; ++layer) {
      const size_t first = routes.size();
      for (size_t k = 0; token > 0 && k < kTopK; ++k) {
        if (uniform(random) < kStickiness) routes.push_back(routes[first - kPerToken + k]);
      }
      while (routes.size() < first + kTopK) {
        const int64_t id = order[layer][zipf(random)];
        if (!Contains(std::span(routes).subspan(first), id)) routes.push_back(id);
      }
    }
  }
  return routes;
}

Routes CircularRoutes() {
  Routes routes;
  for (int64_t token = 0; token < kNumTokens; ++token) {
    for (int32_t layer = 0; layer < kNumLayers; ++layer) {
      for (int64_t k = 0; k < kTopK; ++k) routes.push_back((token * kTopK + k) % kNumExperts);
    }
  }
  return routes;
}

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
    PolicyKind policy;
  } policies[] = {{"lru", PolicyKind::kLru},
                  {"decayed_frequency", PolicyKind::kDecayedFrequency},
                  {"two_level_lru", PolicyKind::kTwoLevelLru},
                  {"on_demand", PolicyKind::kOnDemand}};
  const struct {
    const char* name;
    CacheScope scope;
    int32_t num_slots;
  } tables[] = {{"quota_64_of_128", CacheScope::kLayer, kNumLayers * 64},
                {"global_1536_of_6144", CacheScope::kGlobal, 1536}};
  for (const auto& table : tables) {
    for (const auto& policy : policies) {
      const std::string name = "PlanLayer/" + routing + "/" + table.name + "/" + policy.name;
      benchmark::RegisterBenchmark(name.c_str(), PlanLayer, routes, policy.policy, table.scope,
                                   table.num_slots)
          ->MinTime(0.1)
          ->Repetitions(9)
          ->ReportAggregatesOnly()
          ->ComputeStatistics("min", Min);
    }
  }
}

// Registered while the program starts: benchmark_main runs what is there by then.
[[maybe_unused]] const bool kRegistered = [] {
  static const Routes skewed = SkewedRoutes();
  static const Routes circular = CircularRoutes();
  RegisterAll("skewed", skewed);
  RegisterAll("all_misses", circular);
  return true;
}();

}  // namespace
}  // namespace expertflow
