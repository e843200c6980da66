// CPU time of the predictor for one token and layer: Predict scores all distances, Learn updates
// the models of all distances that end at the layer. Layers take turns, so the weights come from
// memory as they do in a model; bytes are the weights read, and for Learn those written too.

#include <benchmark/benchmark.h>

#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "core/predictor/predictor.h"

namespace expertflow {
namespace {

constexpr int32_t kNumLayers = 12;

std::vector<float> RandomFloats(size_t size) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (float& value : values) value = normal(random);
  return values;
}

// Arguments: hidden size, experts, top-k, distances.
Predictor MakePredictor(const benchmark::State& state) {
  const auto hidden = static_cast<int32_t>(state.range(0));
  const auto num_experts = static_cast<int32_t>(state.range(1));
  const PredictorConfig config{
      .num_layers = kNumLayers,
      .hidden = hidden,
      .max_distance = static_cast<int32_t>(state.range(3)),
      .num_token_buckets = 64,
      .rule = {.num_experts = num_experts, .top_k = static_cast<int32_t>(state.range(2))}};
  const auto num_weights = static_cast<size_t>(kNumLayers * num_experts * hidden);
  return Predictor(config, {RandomFloats(num_weights), {}, {}});
}

// Decodes tokens; `timed` is what the benchmark counts of each layer that has all its distances.
template <class Timed>
void Decode(benchmark::State& state, Timed timed, bool times_learning) {
  Predictor predictor = MakePredictor(state);
  const std::vector<float> hidden = RandomFloats(static_cast<size_t>(state.range(0)));
  const auto max_distance = static_cast<int32_t>(state.range(3));
  int64_t token = 0;
  int32_t layer = kNumLayers;
  const auto next_layer = [&] {
    if (++layer >= kNumLayers) {
      predictor.BeginPass(1, 1, std::vector<int64_t>{token++});
      layer = 0;
    }
    predictor.Observe(layer, hidden);
    if (times_learning) predictor.Predict(layer);
  };
  for (auto _ : state) {
    state.PauseTiming();
    const auto is_full = [&] {
      return times_learning ? layer >= max_distance : layer + max_distance < kNumLayers;
    };
    do next_layer();
    while (!is_full());
    state.ResumeTiming();
    timed(predictor, layer);
  }
  const size_t weights_bytes = predictor.state().Weights(0).size_bytes();
  const auto bytes_per_layer = static_cast<int64_t>(weights_bytes) * max_distance;
  state.SetBytesProcessed(state.iterations() * bytes_per_layer * (times_learning ? 2 : 1));
}

void BM_Predict(benchmark::State& state) {
  Decode(state, [](Predictor& p, int32_t layer) { p.Predict(layer); }, false);
}
void BM_Learn(benchmark::State& state) {
  Decode(state, [](Predictor& p, int32_t layer) { p.Learn(layer); }, true);
}

void Shapes(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"hidden", "experts", "top_k", "distances"});
  benchmark->Args({256, 32, 4, 8})->Args({2048, 64, 6, 4})->Args({2048, 128, 8, 4});
  benchmark->Unit(benchmark::kMicrosecond);
}
BENCHMARK(BM_Predict)->Apply(Shapes);
BENCHMARK(BM_Learn)->Apply(Shapes);

}  // namespace
}  // namespace expertflow
