// What an expert cache decides under a virtual clock, beside the simulator on the same trace: the
// cache has other books (its own clock of layers, bytes counted when they have arrived), but must
// come to the same stall.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "calibrated_guesses.h"
#include "core/bandwidth_estimator.h"
#include "core/cache_control.h"
#include "core/simulator.h"
#include "trace_fixture.h"

namespace expertflow {
namespace {

constexpr int32_t kLayers = 6;
constexpr int32_t kExperts = 16;
constexpr int32_t kTopK = 2;
constexpr int64_t kTokens = 2000;
constexpr int64_t kLayerNs = 100'000;
constexpr size_t kExpertBytes = size_t{1} << 20;
constexpr size_t kChunkBytes = kExpertBytes / 4;

// The link of the simulator for a CacheControl: one copy after the other, two handed out.
class VirtualCache {
 public:
  VirtualCache(const TraceView& trace, const SimulatorConfig& config)
      : trace_(trace),
        link_(config.link),
        predictor_(trace),
        control_({.num_layers = kLayers,
                  .num_experts = kExperts,
                  .num_slots = config.num_slots,
                  .planner = {.top_k = kTopK,
                              .expert_bytes = kExpertBytes,
                              .policy = config.policy,
                              .scope = config.scope},
                  .chunk_bytes = kChunkBytes},
                 VirtualTransfers::kMaxChunksInFlight) {
    control_.set_horizon(config.horizon);
  }

  void Run() {
    while (step_ < trace_.num_steps()) RunLayer();
  }

  double stall_us() const {
    double stall_us = 0.0;
    for (const LayerStatistics& layer : control_.statistics()) stall_us += layer.stall_us;
    return stall_us;
  }
  double mean_horizon() const {
    return static_cast<double>(horizon_sum_) / static_cast<double>(step_);
  }
  const PrefetchStatistics& prefetched() const { return control_.prefetch_statistics(); }

 private:
  struct Copy {
    Chunk chunk;
    double begin_ns;
    double end_ns;
  };

  void RunLayer() {
    if (trace_.LayerOf(step_) == 0) PrefetchFirstLayers();
    AdvanceTo(now_ns_ + kLayerNs / 2);
    const auto experts = trace_.experts(step_);
    const std::vector<int64_t> routed(experts.begin(), experts.end());
    const Plan* plan = control_.BeginLayer(trace_.LayerOf(step_), routed, 1, now_ns_ * 1e-3);
    ASSERT_NE(plan, nullptr);
    StartCopies();
    Prefetch();
    for (int32_t row = 0; row < std::ssize(plan->rows); ++row) {
      const double begin_ns = now_ns_;
      while (!control_.IsReady(row)) EndFirstCopy();
      const bool is_late = control_.RowAt(row).state == RowState::kLoading;
      control_.RecordStall(plan->layer, (now_ns_ - begin_ns) * 1e-3, is_late);
      AdvanceTo(now_ns_ + kLayerNs / 2.0 / kTopK);
      control_.Release(row);
      StartCopies();
    }
    ++step_;
  }

  void PrefetchFirstLayers() {
    const int32_t horizon = control_.BeginToken(1, now_ns_ * 1e-3);
    predictions_.clear();
    predictor_.PredictToken(step_, horizon, predictions_);
    if (!predictions_.empty()) PostPredicted(horizon);
  }

  void Prefetch() {
    const int32_t horizon = control_.BeginPrefetch(bandwidth_.bytes_per_second());
    horizon_sum_ += control_.horizon();
    predictions_.clear();
    predictor_.Predict(step_, horizon, predictions_);
    PostPredicted(horizon);
  }

  void PostPredicted(int32_t horizon) {
    control_.PrefetchPredicted(NeedOf(predictions_, horizon, kExperts));
    StartCopies();
  }

  void StartCopies() {
    while (const std::optional<Chunk> chunk = control_.NextChunk()) {
      const double begin_ns = std::max(now_ns_, link_free_ns_);
      link_free_ns_ = begin_ns + static_cast<double>(link_.latency_ns) +
                      static_cast<double>(chunk->num_bytes) * 1e9 / link_.bytes_per_second;
      copies_.push_back({*chunk, begin_ns, link_free_ns_});
    }
  }

  void EndFirstCopy() {
    const Copy copy = copies_.front();
    copies_.pop_front();
    now_ns_ = std::max(now_ns_, copy.end_ns);
    bandwidth_.Record(copy.chunk.num_bytes, copy.begin_ns * 1e-3, copy.end_ns * 1e-3);
    control_.FinishChunk(copy.chunk, std::nullopt);
    StartCopies();
  }

  void AdvanceTo(double now_ns) {
    while (!copies_.empty() && copies_.front().end_ns <= now_ns) EndFirstCopy();
    now_ns_ = now_ns;
  }

  TraceView trace_;
  LinkProfile link_;
  RecordedPredictor predictor_;
  CacheControl control_;
  BandwidthEstimator bandwidth_;
  std::deque<Copy> copies_;
  std::vector<Prediction> predictions_;
  double now_ns_ = 0.0;
  double link_free_ns_ = 0.0;
  int64_t step_ = 0;
  int64_t horizon_sum_ = 0;
};

// Owns what is foreseen of a trace.
struct ForeseenTrace {
  explicit ForeseenTrace(uint32_t seed)
      : routed(SkewedTrace(kTokens, kLayers, kTopK, kExperts, seed)), guesses(routed.view(), 4) {}

  TraceView view() const {
    TraceView view = routed.view();
    view.predictions = guesses.view();
    return view;
  }

  TestTrace routed;
  CalibratedGuesses guesses;
};

SimulatorConfig Config(double experts_per_layer, int32_t horizon) {
  return {.num_slots = kLayers * kExperts / 2,
          .expert_bytes = kExpertBytes,
          .predictor = PredictorKind::kRecorded,
          .horizon = horizon,
          .link = {experts_per_layer * kExpertBytes / (kLayerNs * 1e-9), 1000},
          .chunk_bytes = kChunkBytes,
          .layer_time_ns = kLayerNs};
}

class SimulatedCacheTest : public testing::TestWithParam<std::pair<double, int32_t>> {};

TEST_P(SimulatedCacheTest, TheCacheDecidesAsTheSimulator) {
  const auto [experts_per_layer, horizon] = GetParam();
  const SimulatorConfig config = Config(experts_per_layer, horizon);
  double stall_us = 0.0, mean_horizon = 0.0, prefetch_hits = 0.0;
  double simulated_us = 0.0, simulated_horizon = 0.0, simulated_hits = 0.0;
  // Duels decide about the horizon, so chance moves that of a single trace.
  for (uint32_t seed = 3; seed < 11; ++seed) {
    const ForeseenTrace trace(seed);
    const SimulationResult simulated = Simulator(trace.view(), config).RunAll();
    simulated_us += static_cast<double>(simulated.stall_ns) * 1e-3;
    simulated_horizon += static_cast<double>(simulated.horizon_sum) / (kTokens * kLayers);
    simulated_hits += static_cast<double>(simulated.prefetch_hits);
    VirtualCache cache(trace.view(), config);
    cache.Run();
    stall_us += cache.stall_us();
    mean_horizon += cache.mean_horizon();
    prefetch_hits += static_cast<double>(cache.prefetched().hits);
  }
  EXPECT_NEAR(stall_us, simulated_us, 0.02 * simulated_us);
  EXPECT_NEAR(mean_horizon, simulated_horizon, 0.05 * simulated_horizon);
  EXPECT_NEAR(prefetch_hits, simulated_hits, 0.02 * simulated_hits + 5.0);
}

constexpr int32_t kAuto = SimulatorConfig::kAutoHorizon;
INSTANTIATE_TEST_SUITE_P(Links, SimulatedCacheTest,
                         testing::Values(std::pair(0.25, kAuto), std::pair(0.5, kAuto),
                                         std::pair(1.0, kAuto), std::pair(4.0, kAuto),
                                         std::pair(0.05, kAuto), std::pair(1.0, 1),
                                         std::pair(1.0, 3)));

TEST(SimulatedCacheTest, LessIsStalledWhereFirstLayersAreForeseen) {
  const ForeseenTrace trace(3);
  TraceView begun_blindly = trace.view();
  begun_blindly.predictions.first_expert_ids = nullptr;
  for (const int32_t horizon : {1, kAuto}) {
    const SimulatorConfig config = Config(4.0, horizon);
    VirtualCache foreseeing(trace.view(), config);
    foreseeing.Run();
    VirtualCache blind(begun_blindly, config);
    blind.Run();
    EXPECT_LT(foreseeing.stall_us(), 0.9 * blind.stall_us()) << "horizon " << horizon;
    EXPECT_GT(foreseeing.prefetched().hits, blind.prefetched().hits) << "horizon " << horizon;
  }
}

}  // namespace
}  // namespace expertflow
