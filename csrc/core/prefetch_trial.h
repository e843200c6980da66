#pragma once

#include <cstdint>
#include <span>

#include "core/prefetcher.h"
#include "core/savings_evidence.h"
#include "core/shadow_cache.h"
#include "core/trial_rest.h"

namespace expertflow {

// Finds out whether prefetching pays, at no cost to the cache that it is about. Two shadow caches
// serve its routes: one without prefetching, one with all that prefetching brings along (admission,
// protected residents, eviction by what a miss costs). Prefetching begins once the second has
// stalled less by more than chance explains, and ends once it has not for a while. Where it does
// not pay, the cache does as if there were no predictor.
//
// They are compared over blocks of layers in which something stalled: where stalls are rare, blocks
// are long. Where it is clear either way, both rest, for longer each time; while they do, nothing
// need be predicted for them.
//
// How much of a layer's compute time is its experts', which can go on while others arrive, is not
// measured. While the cache does not prefetch, it is what makes the shadow without prefetching
// stall as long as the cache does.
class PrefetchTrial {
 public:
  // As for ShadowCache.
  PrefetchTrial(const SlotTableView& table, const Planner& planner, const TransferQueue& queue,
                const PlannerConfig& config);

  // A layer was planned; see ShadowCache::BeginLayer. `measured.stall_us` is the cache's own.
  void BeginLayer(int32_t layer, Tick tick, std::span<const int64_t> experts,
                  const LayerObservation& measured);
  // A token begins, `compute_us` before the plan of its first layer; see ShadowCache::BeginToken.
  // Returns how many layers to predict.
  int32_t BeginToken(double compute_us);
  // Something happened that the shadows do not follow, as a prompt: they start anew.
  void Interrupt() { is_following_ = false; }

  // Whether prefetching pays, so far as is known.
  bool pays() const { return pays_; }
  // How many layers ahead to predict for the trial; then what was predicted.
  int32_t horizon() const { return is_following_ ? prefetching_.prefetcher().horizon() : 0; }
  void Prefetch(std::span<const Prediction> predictions);
  void PrefetchNeeded(std::span<const float> need);

  // The prefetcher on trial, with what it has learned.
  const Prefetcher& prefetcher() const { return prefetching_.prefetcher(); }

 private:
  // Sums over the layers of a block.
  struct Block {
    int32_t num_layers = 0;
    double compute_us = 0.0;
    double plain_us = 0.0;        // stall of the shadow without prefetching
    double prefetching_us = 0.0;  // of the other
    double measured_us = 0.0;     // of the cache

    bool is_complete() const;
  };

  void Follow();
  void EndBlock();
  void FitExpertsShare();
  void SetPays(bool pays);
  void RestIfClear();

  ShadowCache plain_;
  ShadowCache prefetching_;
  bool is_following_ = false;
  bool pays_ = false;
  Block block_;
  int32_t num_layers_ = 0;  // since a rest or a change of mind
  double experts_share_ = 0.5;
  SavingsEvidence evidence_;
  TrialRest rest_;
};

}  // namespace expertflow
