#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "core/planner.h"
#include "core/prefetch_scheduler.h"
#include "core/prefetcher.h"
#include "core/simulation/next_uses.h"
#include "core/simulation/step_predictor.h"
#include "core/simulation/virtual_decoder.h"
#include "core/simulation/virtual_transfers.h"
#include "core/slot_table.h"
#include "core/trace.h"

namespace expertflow {

enum class PredictorKind : int32_t { kNone, kOracle, kRecorded, kIds };

// Throws std::invalid_argument that lists the names there are.
PredictorKind ParsePredictor(std::string_view name);

struct SimulatorConfig {
  static constexpr int32_t kAutoHorizon = Prefetcher::kAutoHorizon;

  int32_t num_slots;
  size_t expert_bytes;
  PolicyKind policy = PolicyKind::kDecayedFrequency;
  bool belady = false;  // evict what the trace needs last, whatever `policy` says
  CacheScope scope = CacheScope::kGlobal;
  PredictorKind predictor = PredictorKind::kNone;
  int32_t horizon = kAutoHorizon;  // or that many layers, the top-k predictions of each
  LinkProfile link;
  size_t chunk_bytes = size_t{1} << 20;
  size_t demand_chunk_bytes = 0;  // as for TransferQueue
  int64_t layer_time_ns = 0;      // compute of one layer
  double expert_share = 0.5;      // of the layer time: the routed experts, after the router
  int64_t miss_time_ns = 0;       // compute of each expert that is not there at its layer's plan
  double copy_slowdown = 0.0;     // of computation while copies are under way, as a share of it
  int64_t warmup_tokens = 0;      // left out of the results
};

struct SimulationResult {
  int64_t num_tokens = 0;
  LayerStatistics counts;     // of all layers; `hits` includes prefetch hits
  int64_t prefetch_hits = 0;  // ready in time because a prefetch had brought them, first use only
  int64_t stall_ns = 0;
  int64_t late_stall_ns = 0;  // part of stall_ns: waiting for prefetches in flight
  int64_t horizon_sum = 0;    // over all layers of all tokens
};

// A decode run over a trace, under a virtual clock: the slot table, planner, queue and prefetch
// rules of the real caches, with a link and a compute time that a profile gives.
//
// Each layer computes for (1 - expert_share) of its time, then routes, plans and prefetches, and
// then computes its experts one after the other, resident ones first, waiting for those that are
// not there yet: that wait is the stall. Each of the latter takes `miss_time_ns` before that, to
// launch it alone, say. Copies under way slow computation down by `copy_slowdown`.
// Deterministic.
class Simulator {
 public:
  static constexpr int32_t kMaxHorizon = Prefetcher::kMaxHorizon;

  // Keeps a view of the trace. Throws std::invalid_argument for a configuration that does not fit.
  Simulator(const TraceView& trace, const SimulatorConfig& config);

  Simulator(const Simulator&) = delete;
  Simulator& operator=(const Simulator&) = delete;

  // Runs the next token, of which there must be one.
  void RunToken();
  bool is_done() const { return step_ == trace_.num_steps(); }
  SimulationResult RunAll();

  SimulationResult result() const;
  int32_t horizon() const { return prefetcher_.horizon(); }
  // Copies that start later take the time that this link needs.
  void set_link(const LinkProfile& link) { transfers_.set_link(link); }

 private:
  void RunLayer();
  const Plan& PlanLayer(int32_t layer);
  LayerObservation Observe();
  void PrefetchFirstLayers();
  void Prefetch(const Plan& plan);
  void PostPredicted();
  int64_t ExpertNs() const;
  void RankByNextUse(SlotId slot);
  void ResetCounts();

  TraceView trace_;
  SimulatorConfig config_;
  SlotTable table_;
  Planner planner_;
  VirtualTransfers transfers_;
  VirtualDecoder decoder_;
  Prefetcher prefetcher_;
  std::unique_ptr<StepPredictor> predictor_;
  std::optional<NextUses> next_uses_;
  std::vector<int64_t> routed_;  // [top_k]
  std::vector<Prediction> predictions_;
  int64_t step_ = 0;
  int64_t horizon_sum_ = 0;
  // Totals when the scheduler looked last.
  struct {
    int64_t stall_ns = 0;
    int64_t late_stall_ns = 0;
    size_t moved_bytes = 0;
  } observed_;
};

}  // namespace expertflow
