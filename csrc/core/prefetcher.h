#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "core/ids.h"
#include "core/miss_costs.h"
#include "core/plan.h"
#include "core/planner.h"
#include "core/prefetch_backlog.h"
#include "core/prefetch_ledger.h"
#include "core/prefetch_scheduler.h"
#include "core/slot_table.h"
#include "core/transfer_queue.h"

namespace expertflow {

class PrefetchTrial;

// What became of prefetched experts since the last reset.
struct PrefetchStatistics {
  int64_t hits = 0;    // needed for the first time, and there in time
  int64_t used = 0;    // hits, and those that came late
  int64_t wasted = 0;  // evicted without a use
};

// Carries out what the scheduler decides about predictions: which experts to fetch ahead, and which
// residents to keep until then; but where PrefetchTrial has not found that this pays, nothing. The
// caches and the simulator decide with it alike.
//
//   RecordPlan(plan)                     every plan
//   distance = BeginLayer(measured)      what to predict for that plan's layer
//   Prefetch(predictions, post)
//
// and where a token's id, and with it its embedding, is known before the plan of its first layer:
//
//   horizon = BeginToken(time until that plan); Prefetch(predictions, post)
//
// A prediction of distance d is about MoE layer (planned layer + d) modulo the number of layers:
// past the last layer those of the next token follow. Eviction learns from what the scheduler
// measures which layers' misses cost most (MissCosts). Allocates nothing after construction, but
// for what `post` does. The caller serialises the calls.
class Prefetcher {
 public:
  static constexpr int32_t kAutoHorizon = -1;
  static constexpr int32_t kMaxHorizon = PrefetchBacklog::kMaxDistance;

  // Queues the transfer of the expert that `slot` was given to, which is needed at `needed_at`.
  using Post = std::function<void(SlotId slot, Tick needed_at)>;

  // An adaptive prefetcher first finds out in a trial whether prefetching pays; one that is itself
  // on trial takes that for granted.
  enum Trial : uint8_t { kUntried, kTried };

  // All of the same cache; the references are kept.
  Prefetcher(const SlotTableView& table, Planner& planner, TransferQueue& queue,
             const PlannerConfig& config, Trial trial = kTried);
  ~Prefetcher();

  // kAutoHorizon, or a fixed number of layers: then the top-k predictions of each are fetched, and
  // nothing is refused. On demand it is always 0. Throws std::invalid_argument for others than 0 to
  // kMaxHorizon.
  void set_horizon(int32_t horizon);

  void RecordPlan(const Plan& plan);

  // Returns how many layers ahead to predict for the plan recorded last: the horizon, or more where
  // a trial needs it. `measured` holds times, moved bytes and bandwidth; the rest is filled in
  // here.
  int32_t BeginLayer(LayerObservation measured);
  // The same where nothing of use was measured: the scheduler learns nothing.
  int32_t BeginUnmeasuredLayer();

  // A pass over `num_tokens` rows begins; `compute_us` pass until its first layer is planned, 0:
  // that is not known yet. Returns how many layers to predict, layer 0 being of distance 1. Nothing
  // is measured here: what became of its prefetches is part of what the layers' observations hold.
  int32_t BeginToken(int32_t num_tokens, double compute_us);

  // Protects those of `predictions` that are resident and expected, and posts those that are
  // admitted: the more probable expert first, unless that would make a prefetch late that is needed
  // later. With no slot left it takes that of a resident that `predictions` expect, if it is so
  // much more probable that this is worth a transfer; what earlier ones have protected stays. What
  // was posted before is decided anew beside them, and given up if it is not admitted, or not among
  // them: nothing to say is no reason to call. With a fixed horizon, posts the top-k of each
  // distance, which come in that order, the nearer layers first. Reorders and shortens
  // `predictions`. Returns how many were posted.
  int32_t Prefetch(std::vector<Prediction>& predictions, const Post& post);

  // The same for the probabilities `need` [distances, num_experts]: row d - 1 is about the layer d
  // ahead. Rows beyond the horizon are ignored. Throws std::invalid_argument for another shape.
  int32_t PrefetchNeeded(std::span<const float> need, const Post& post);

  // A slot for one expert, whatever the scheduler thinks of it; see Planner::PlanPrefetch.
  SlotId Take(ExpertId expert, Tick needed_at);

  // For ShadowCache: forgets what was prefetched, but not what was learned.
  void Restart();

  int32_t horizon() const { return horizon_; }  // of the layer begun last
  const PrefetchStatistics& statistics() const { return statistics_; }
  void ResetStatistics() { statistics_ = {}; }

 private:
  int32_t PrefetchRanked(std::vector<Prediction>& predictions, const Post& post);
  bool is_fixed() const { return chosen_horizon_ != kAutoHorizon; }
  ExpertId ExpertOf(const Prediction& prediction) const;
  SlotId SlotOf(const Prediction& prediction) const;
  Tick NeededAt(const Prediction& prediction) const { return tick_ + prediction.distance; }
  bool IsExpected(const Prediction& prediction) const;
  bool IsWanted(const Prediction& prediction, size_t num_bytes) const;
  bool DelaysLaterOnes(const Prediction& prediction, size_t num_bytes, size_t bytes_ahead) const;
  void ProtectExpected(std::span<const Prediction> predictions);
  bool MakeRoomFor(const Prediction& prediction);
  void DecideAnew(std::vector<Prediction>& ranked);
  bool GiveUp(SlotId slot, Tick needed_at);
  void FollowTrial(const LayerObservation& measured);
  void ClearBiases();
  void LearnMissCost(const LayerObservation& measured);
  void RankRow(int32_t distance, std::span<const float> need);
  void KeepTopK(std::vector<Prediction>& predictions) const;

  SlotTableView table_;
  Planner& planner_;
  TransferQueue& queue_;
  int32_t top_k_;
  size_t expert_bytes_;
  bool keeps_experts_;
  PrefetchScheduler scheduler_;
  PrefetchLedger ledger_;
  PrefetchBacklog backlog_;
  MissCosts miss_costs_;
  int32_t chosen_horizon_ = kAutoHorizon;
  int32_t horizon_ = 0;
  int32_t layer_ = 0;  // of the last plan, as the next three
  Tick tick_ = 0;
  bool is_streaming_ = false;
  int32_t num_fetched_ = 0;
  int32_t measured_layer_ = -1;  // whose stall the next observation holds; -1: of several
  int32_t measured_num_fetched_ = 0;
  PrefetchLedger::Counts counts_;  // that the scheduler has not seen
  PrefetchStatistics statistics_;
  std::unique_ptr<PrefetchTrial> trial_;  // none while it is on trial itself
  bool pays_;                             // as the trial has found
  std::vector<int64_t> routed_;           // experts of the last plan
  std::vector<Prediction> ranked_;        // [kMaxHorizon * num_experts] at most, as the next
  std::vector<Prediction> expected_;      // residents that are protected, the most probable first
};

}  // namespace expertflow
