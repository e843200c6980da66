// The same trace on the real expert cache of the CPU backend, behind a throttled link and with a
// fixed compute time a layer, and in the simulator: measured and simulated stall per token, and the
// mean horizon of both.
//
// The routing keeps half of the experts of the token before; 6 layers of 16 experts, top-2. An
// expert is 4 chunks of 1 MiB at 1 GB/s, a layer computes for 3 ms, half of it in the experts. One
// worker thread copies beside the thread that waits, as the simulator's two chunks in flight.
// "oracle" knows the routing; "guesses" come true as often as they say, those of a token's first
// layers, made when it begins, as well.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "calibrated_guesses.h"
#include "core/simulation/step_predictor.h"
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

std::unique_ptr<StepPredictor> MakePredictor(PredictorKind kind, const TraceView& trace) {
  if (kind == PredictorKind::kOracle) return std::make_unique<OraclePredictor>(trace);
  if (kind == PredictorKind::kRecorded) return std::make_unique<RecordedPredictor>(trace);
  return nullptr;
}

class RealRun {
 public:
  RealRun(const TraceView& trace, const SimulatorConfig& config)
      : trace_(trace), predictor_(MakePredictor(config.predictor, trace)) {
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
    cache_->SetHorizon(config.horizon);
  }

  double StallUsPerToken() {
    for (int64_t step = 0; step < trace_.num_steps(); ++step) {
      if (step == kWarmupTokens * kNumLayers) {
        cache_->ResetStatistics();
        horizon_sum_ = 0;
      }
      RunLayer(step);
    }
    double stall_us = 0.0;
    for (const LayerStatistics& layer : cache_->statistics()) stall_us += layer.stall_us;
    return stall_us / static_cast<double>(kNumTokens - kWarmupTokens);
  }

  int64_t horizon_sum() const { return horizon_sum_; }

 private:
  void RunLayer(int64_t step) {
    if (predictor_ && trace_.LayerOf(step) == 0) PrefetchFirstLayers(step);
    WaitUntil(Clock::now() + kHalfLayerTime);
    const auto experts = trace_.experts(step);
    const std::vector<int64_t> routed(experts.begin(), experts.end());
    const Plan& plan = cache_->BeginLayer(trace_.LayerOf(step), routed, 1);
    if (predictor_) Prefetch(step);
    const auto num_rows = static_cast<int32_t>(plan.rows.size());
    for (int32_t r = 0; r < num_rows; ++r) {
      cache_->Wait(r);
      WaitUntil(Clock::now() + kHalfLayerTime / num_rows);
      cache_->Release(r);
    }
  }

  void PrefetchFirstLayers(int64_t step) {
    const int32_t horizon = cache_->BeginToken(1);
    std::vector<Prediction> predictions;
    predictor_->PredictToken(step, horizon, predictions);
    PostPredicted(predictions, horizon);
  }

  void Prefetch(int64_t step) {
    const int32_t horizon = cache_->BeginPrefetch();
    horizon_sum_ += cache_->horizon();
    std::vector<Prediction> predictions;
    predictor_->Predict(step, horizon, predictions);
    PostPredicted(predictions, horizon);
  }

  void PostPredicted(const std::vector<Prediction>& predictions, int32_t horizon) {
    cache_->PrefetchPredicted(NeedOf(predictions, horizon, kNumExperts));
  }

  TraceView trace_;
  std::unique_ptr<StepPredictor> predictor_;
  std::unique_ptr<ExpertCache> cache_;
  int64_t horizon_sum_ = 0;
};

struct Run {
  const char* name;
  PolicyKind policy;
  PredictorKind predictor;
  int32_t horizon;
};

SimulatorConfig Config(const Run& run) {
  return {.num_slots = kNumLayers * kNumExperts / 2,
          .expert_bytes = kExpertBytes,
          .policy = run.policy,
          .predictor = run.predictor,
          .horizon = run.horizon,
          .link = kLink,
          .chunk_bytes = kChunkBytes,
          .layer_time_ns = std::chrono::nanoseconds(2 * kHalfLayerTime).count(),
          .warmup_tokens = kWarmupTokens};
}

void Stall(benchmark::State& state, const Run& run) {
  const std::vector<uint16_t> routes = StickyRoutes();
  TraceView trace{.num_tokens = kNumTokens,
                  .num_layers = kNumLayers,
                  .top_k = kTopK,
                  .num_experts = kNumExperts,
                  .expert_ids = routes.data(),
                  .predictions = {}};
  const CalibratedGuesses guesses(trace, Simulator::kMaxHorizon);
  trace.predictions = guesses.view();
  const SimulatorConfig config = Config(run);
  constexpr auto kTokens = static_cast<double>(kNumTokens - kWarmupTokens);
  const SimulationResult simulated = Simulator(trace, config).RunAll();
  const double simulated_us = static_cast<double>(simulated.stall_ns) * 1e-3 / kTokens;
  double measured_us = 0.0;
  int64_t horizon_sum = 0;
  for (auto _ : state) {
    RealRun real(trace, config);
    measured_us = real.StallUsPerToken();
    horizon_sum = real.horizon_sum();
  }
  state.counters["measured_us_per_token"] = measured_us;
  state.counters["simulated_us_per_token"] = simulated_us;
  state.counters["measured/simulated"] = measured_us / simulated_us;
  state.counters["measured_horizon"] = static_cast<double>(horizon_sum) / kTokens / kNumLayers;
  state.counters["simulated_horizon"] =
      static_cast<double>(simulated.horizon_sum) / kTokens / kNumLayers;
}

[[maybe_unused]] const bool kRegistered = [] {
  using enum PolicyKind;
  using enum PredictorKind;
  constexpr int32_t kAuto = SimulatorConfig::kAutoHorizon;
  const Run runs[] = {{"on_demand", kOnDemand, kNone, 0},
                      {"lru", kLru, kNone, 0},
                      {"decayed_frequency", kDecayedFrequency, kNone, 0},
                      {"decayed_frequency/oracle_1_layer_ahead", kDecayedFrequency, kOracle, 1},
                      {"decayed_frequency/oracle_3_layers_ahead", kDecayedFrequency, kOracle, 3},
                      {"decayed_frequency/oracle_adaptive", kDecayedFrequency, kOracle, kAuto},
                      {"decayed_frequency/guesses_1_layer_ahead", kDecayedFrequency, kRecorded, 1},
                      {"decayed_frequency/guesses_3_layers_ahead", kDecayedFrequency, kRecorded, 3},
                      {"decayed_frequency/guesses_adaptive", kDecayedFrequency, kRecorded, kAuto},
                      {"predicted_need/guesses_adaptive", kPredictedNeed, kRecorded, kAuto}};
  for (const Run& run : runs) {
    const std::string name = std::string("Stall/") + run.name;
    benchmark::RegisterBenchmark(name.c_str(), Stall, run)
        ->Iterations(1)
        ->Repetitions(5)
        ->ComputeStatistics(  // the run that was disturbed least
            "min",
            [](const std::vector<double>& values) { return *std::ranges::min_element(values); })
        ->Unit(benchmark::kMillisecond);
  }
  return true;
}();

}  // namespace
}  // namespace expertflow
