#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "core/plan.h"
#include "core/planner.h"
#include "core/prefetcher.h"
#include "core/simulation/virtual_decoder.h"
#include "core/simulation/virtual_transfers.h"
#include "core/slot_table.h"
#include "core/transfer_queue.h"

namespace expertflow {

// What a cache would do, with or without prefetching, while another one, the real one, serves the
// same routes: who would be resident, when transfers would end, and what computation would wait for
// them. Holds no experts. Half of a layer's compute time is taken to be before its plan, as that of
// the simulator is.
//
//   Restart()                             from what the real one holds
//   stall_us = BeginLayer(plan, measured)  every plan of the real one, once it is made
//   Prefetch(...)                         if it prefetches
//
// Allocates nothing after construction. Pure: times are arguments.
class ShadowCache {
 public:
  // The parts of the real cache; the references to table and planner are kept.
  ShadowCache(const SlotTableView& table, const Planner& planner, const TransferQueue& queue,
              const PlannerConfig& config, bool prefetches);

  ShadowCache(const ShadowCache&) = delete;
  ShadowCache& operator=(const ShadowCache&) = delete;

  // Holds what the real cache holds, with nothing under way.
  void Restart();

  // The real cache has planned a layer for `experts`, not those of a prompt, and the one before has
  // computed for `measured.compute_us`, on the link of that bandwidth. Returns for how long the one
  // before would have waited here.
  double BeginLayer(int32_t layer, Tick tick, std::span<const int64_t> experts,
                    const LayerObservation& measured);

  // The layer before was the last of its token. The next one is planned `compute_us` from now.
  void BeginToken(double compute_us);

  // See Prefetcher, after BeginLayer or BeginToken.
  void Prefetch(std::span<const Prediction> predictions);
  void PrefetchNeeded(std::span<const float> need);

  // Of a layer's compute time, from 0 to 1: its experts', after its plan. At first half.
  void set_experts_share(double share) { experts_share_ = share; }

  Prefetcher& prefetcher() { return prefetcher_; }
  const Prefetcher& prefetcher() const { return prefetcher_; }

 private:
  void ComputeUntilPlan();
  void ComputeExperts();

  SlotTableView real_;
  bool prefetches_;
  SlotTable table_;
  Planner planner_;
  VirtualTransfers transfers_;
  VirtualDecoder decoder_;  // its stall is of the planned layer
  Prefetcher prefetcher_;
  Prefetcher::Post post_prefetch_;
  std::vector<Prediction> predictions_;
  double experts_share_ = 0.5;
  const Plan* plan_ = nullptr;
  double compute_us_ = 0.0;  // of the layer measured last
  // From now until the next plan, once a token has begun.
  std::optional<double> until_plan_us_;
  size_t moved_bytes_ = 0;  // until the plan
};

}  // namespace expertflow
