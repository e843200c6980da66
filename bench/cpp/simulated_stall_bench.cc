// The same trace on the real expert cache of the CPU backend, behind a throttled link and with a
// fixed compute time a layer, and in the simulator: measured and simulated stall per token.
//
// The routing keeps half of the experts of the token before; 6 layers of 16 experts, top-2. An
// expert is 4 chunks of 1 MiB at 1 GB/s, a layer computes for 3 ms, half of it in the experts. One
// worker thread copies beside the thread that waits, as the simulator's two chunks in flight.

#include <benchmark/benchmark.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/simulator.h"
#include "host/expert_cache.h"
#include "throttled_source.h"

namespace expertflow {
namespace {

constexpr int32_t kNumLayers = 6;
constexpr int32_t kNumExperts = 16;
constexpr int32_t kTopK = 2;
constexpr int64_t kNumTokens = 100;
constexpr int64_t kWarmupTokens = 10;
constexpr size_t kChunkBytes = size_t{1} << 20;
constexpr size_t kExpertBytes = 4 * kChunkBytes;
constexpr std::chrono::microseconds kHalfLayerTime(1500);
constexpr LinkProfile kLink{.bytes_per_second = 1e9, .latency_ns = 20'000};

std::vector<uint16_t> StickyRoutes() {
  std::vector<uint16_t> ids;
  uint32_t state = 7;
  const auto draw = [&state] { return (state = state * 1664525U + 1013904223U) >> 16; };
  constexpr size_t kPerToken = kNumLayers * kTopK;
  while (ids.size() < kNumTokens * kPerToken) {
    const size_t place = ids.size();
    const bool stays = place >= kPerToken && draw() % 2 == 0;
    const auto id = stays ? ids[place - kPerToken] : static_cast<uint16_t>(draw() % kNumExperts);
    if (place % kTopK == 0 || ids.back() != id) ids.push_back(id);
  }
  return ids;
}

SimulatorConfig Config(PolicyKind policy, int32_t horizon) {
  return {.num_slots = kNumLayers * kNumExperts / 2,
          .expert_bytes = kExpertBytes,
          .policy = policy,
          .predictor = horizon > 0 ? PredictorKind::kOracle : PredictorKind::kNone,
          .horizon = horizon,
          .link = kLink,
          .chunk_bytes = kChunkBytes,
          .layer_time_ns = std::chrono::nanoseconds(2 * kHalfLayerTime).count(),
          .warmup_tokens = kWarmupTokens};
}

class RealRun {
 public:
  RealRun(const TraceView& trace, const SimulatorConfig& config)
      : trace_(trace), horizon_(config.horizon) {
    const ExpertLayout layout({{"w", DType::kFloat32, kExpertBytes / 4}});
    auto source = std::make_shared<ThrottledSource>(size_t{kNumLayers * kNumExperts}, kExpertBytes,
                                                    config.link);
    cache_ =
        std::make_unique<ExpertCache>(source, layout,
                                      ExpertCacheOptions{.num_layers = kNumLayers,
                                                         .num_experts = kNumExperts,
                                                         .num_slots = config.num_slots,
                                                         .planner = {.top_k = kTopK,
                                                                     .expert_bytes = kExpertBytes,
                                                                     .policy = config.policy,
                                                                     .scope = config.scope},
                                                         .chunk_bytes = kChunkBytes,
                                                         .num_threads = 1});
  }

  double StallUsPerToken() {
    for (int64_t step = 0; step < trace_.num_steps(); ++step) {
      if (step == kWarmupTokens * kNumLayers) cache_->ResetStatistics();
      RunLayer(step);
    }
    double stall_us = 0.0;
    for (const LayerStatistics& layer : cache_->statistics()) stall_us += layer.stall_us;
    return stall_us / static_cast<double>(kNumTokens - kWarmupTokens);
  }

 private:
  std::vector<int64_t> Routed(int64_t step) const {
    const auto experts = trace_.experts(step);
    return {experts.begin(), experts.end()};
  }

  void RunLayer(int64_t step) {
    WaitUntil(Clock::now() + kHalfLayerTime);
    const Plan& plan = cache_->BeginLayer(trace_.LayerOf(step), Routed(step), 1);
    for (int32_t d = 1; d <= horizon_ && step + d < trace_.num_steps(); ++d) {
      cache_->Prefetch(trace_.LayerOf(step + d), Routed(step + d), d);
    }
    const auto num_rows = static_cast<int32_t>(plan.rows.size());
    for (int32_t r = 0; r < num_rows; ++r) {
      cache_->Wait(r);
      WaitUntil(Clock::now() + kHalfLayerTime / num_rows);
      cache_->Release(r);
    }
  }

  TraceView trace_;
  int32_t horizon_;
  std::unique_ptr<ExpertCache> cache_;
};

void Stall(benchmark::State& state, PolicyKind policy, int32_t horizon) {
  const std::vector<uint16_t> routes = StickyRoutes();
  const TraceView trace{.num_tokens = kNumTokens,
                        .num_layers = kNumLayers,
                        .top_k = kTopK,
                        .num_experts = kNumExperts,
                        .expert_ids = routes.data(),
                        .predictions = {}};
  const SimulatorConfig config = Config(policy, horizon);
  const double simulated_us = static_cast<double>(Simulator(trace, config).RunAll().stall_ns) *
                              1e-3 / static_cast<double>(kNumTokens - kWarmupTokens);
  double measured_us = 0.0;
  for (auto _ : state) measured_us = RealRun(trace, config).StallUsPerToken();
  state.counters["measured_us_per_token"] = measured_us;
  state.counters["simulated_us_per_token"] = simulated_us;
  state.counters["measured/simulated"] = measured_us / simulated_us;
}

[[maybe_unused]] const bool kRegistered = [] {
  const struct {
    const char* name;
    PolicyKind policy;
    int32_t horizon;
  } runs[] = {{"on_demand", PolicyKind::kOnDemand, 0},
              {"lru", PolicyKind::kLru, 0},
              {"decayed_frequency", PolicyKind::kDecayedFrequency, 0},
              {"decayed_frequency/oracle_1_layer_ahead", PolicyKind::kDecayedFrequency, 1},
              {"decayed_frequency/oracle_3_layers_ahead", PolicyKind::kDecayedFrequency, 3}};
  for (const auto& run : runs) {
    const std::string name = std::string("Stall/") + run.name;
    benchmark::RegisterBenchmark(name.c_str(), Stall, run.policy, run.horizon)
        ->Iterations(1)
        ->Repetitions(3)
        ->Unit(benchmark::kMillisecond);
  }
  return true;
}();

}  // namespace
}  // namespace expertflow
