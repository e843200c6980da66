// What a trial of prefetching costs the host for each layer (PrefetchTrial follows with both of its
// shadow caches): a model with 48 layers of 128 experts, top-8, half of them cached, experts of 9
// MiB on 55 GB/s, 300 us a layer; four in five experts foreseen.

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/shadow_cache.h"
#include "routes.h"

namespace expertflow {
namespace {

constexpr int32_t kNumLayers = 48;
constexpr int32_t kNumExperts = 128;
constexpr int32_t kTopK = 8;
constexpr int32_t kNumTokens = 64;
constexpr int32_t kNumSlots = kNumLayers * kNumExperts / 2;
constexpr size_t kChunkBytes = size_t{2} << 20;
constexpr PlannerConfig kConfig{
    .top_k = kTopK, .expert_bytes = size_t{9} << 20, .policy = PolicyKind::kDecayedFrequency};
constexpr LayerObservation kMeasured{.compute_us = 300.0, .bytes_per_second = 55e9};
constexpr float kForeseen = 0.8F;
constexpr float kElse = 0.02F;

// One layer after the other, over and over.
class Decoder {
 public:
  explicit Decoder(bool prefetches)
      : routes_(SkewedRoutes({kNumLayers, kNumExperts, kTopK, kNumTokens}, 0.8, 0.5)),
        table_(kNumLayers, kNumExperts, kNumSlots),
        planner_(table_, kConfig),
        queue_(kNumSlots, kChunkBytes, 2),
        shadow_(table_.view(), planner_, queue_, kConfig, prefetches),
        prefetches_(prefetches) {
    shadow_.Restart();
    MakeNeeds();
  }

  void RunLayer() {
    shadow_.BeginLayer(static_cast<int32_t>(step_ % kNumLayers), ++now_, ExpertsOf(step_),
                       kMeasured);
    if (prefetches_) shadow_.PrefetchNeeded(std::span(needs_).subspan(step_ * kNeeds, kNeeds));
    step_ = (step_ + 1) % kNumSteps;
  }

 private:
  static constexpr size_t kNumSteps = size_t{kNumTokens} * kNumLayers;
  static constexpr size_t kNeeds = size_t{Prefetcher::kMaxHorizon} * kNumExperts;

  std::span<const int64_t> ExpertsOf(size_t step) const {
    return {routes_.data() + step % kNumSteps * kTopK, kTopK};
  }

  void MakeNeeds() {
    needs_.assign(kNumSteps * kNeeds, kElse);
    for (size_t step = 0; step < kNumSteps; ++step) {
      for (size_t row = 0; row < size_t{Prefetcher::kMaxHorizon}; ++row) {
        float* need = needs_.data() + step * kNeeds + row * kNumExperts;
        for (const int64_t expert : ExpertsOf(step + row + 1)) {
          const bool is_foreseen = (step + row + static_cast<size_t>(expert)) % 5 > 0;
          need[is_foreseen ? expert : (expert + 1) % kNumExperts] = kForeseen;
        }
      }
    }
  }

  Routes routes_;
  std::vector<float> needs_;  // [steps, distances, experts]
  SlotTable table_;
  Planner planner_;
  TransferQueue queue_;
  ShadowCache shadow_;
  bool prefetches_;
  size_t step_ = 0;
  Tick now_ = 0;
};

void ShadowLayer(benchmark::State& state) {
  Decoder decoder(state.range(0) == 1);
  for (int32_t i = 0; i < kNumTokens * kNumLayers; ++i) decoder.RunLayer();
  for (auto _ : state) decoder.RunLayer();
}
BENCHMARK(ShadowLayer)->ArgName("prefetches")->Arg(0)->Arg(1)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace expertflow
