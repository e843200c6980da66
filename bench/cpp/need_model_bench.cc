// Time to learn from one layer's routes and to score its experts anew, with a cache of half of
// them: the part of a plan that the policy predicted_need adds, all layers in turn.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "core/eviction/need_model.h"
#include "routes.h"

namespace expertflow {
namespace {

constexpr int32_t kNumTokens = 512;

double Min(const std::vector<double>& values) { return *std::ranges::min_element(values); }

void Observe(benchmark::State& state) {
  const auto num_layers = static_cast<int32_t>(state.range(0));
  const auto num_experts = static_cast<int32_t>(state.range(1));
  const auto top_k = static_cast<int32_t>(state.range(2));
  const Routes routes = SkewedRoutes({num_layers, num_experts, top_k, kNumTokens}, 0.8, 0.5);
  const std::vector<int32_t> ids(routes.begin(), routes.end());
  NeedModel model(num_layers, num_experts, top_k, num_layers * num_experts / 2);
  size_t step = 0;
  const auto observe_next_layer = [&] {
    const auto k = static_cast<size_t>(top_k);
    model.Observe(static_cast<int32_t>(step) % num_layers, std::span(ids).subspan(step * k, k));
    if (++step == ids.size() / k) step = 0;
  };
  for (int32_t i = 0; i < kNumTokens * num_layers; ++i) observe_next_layer();
  for (auto _ : state) observe_next_layer();
}

BENCHMARK(Observe)
    ->ArgNames({"layers", "experts", "top_k"})
    ->Args({24, 32, 4})
    ->Args({26, 64, 6})
    ->Args({48, 128, 8})
    ->MinTime(0.1)
    ->Repetitions(9)
    ->ReportAggregatesOnly()
    ->ComputeStatistics("min", Min);

}  // namespace
}  // namespace expertflow
