#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/eviction/decayed_frequency.h"
#include "core/eviction/need_model.h"
#include "core/eviction/policy.h"
#include "core/plan.h"
#include "core/planning.h"
#include "core/slot_table.h"
#include "core/statistics.h"

namespace expertflow {

struct PlannerConfig {
  int32_t top_k;
  size_t expert_bytes;
  PolicyKind policy = PolicyKind::kDecayedFrequency;
  CacheScope scope = CacheScope::kGlobal;
  double decay_per_token = 0.98;  // of use frequencies, in (0, 1]
};

// The view of a table whose arrays, like the logarithms (DecayedFrequency::MakeLog2Table) and the
// statistics [num_layers], lie where the planning happens: in host or device memory. Throws
// std::invalid_argument if the table has fewer slots than Planner::MinSlots, or top-k or the decay
// are out of range.
PlanningView MakePlanningView(const PlannerConfig& config, const SlotTableView& table,
                              const int32_t* log2_table, LayerStatistics* statistics);

// Decides, for one layer at a time, which experts are resident and which slot each missing one
// takes. Changes the table and nothing else; allocates nothing after construction. Not thread-safe.
// What it does to a slot or a row is in core/planning.h.
class Planner {
 public:
  // Throws as MakePlanningView does. A planner with a `leader` takes the needs that this one
  // foresees, instead of learning the same: the leader must plan every layer first.
  Planner(SlotTable& table, const PlannerConfig& config, const Planner* leader = nullptr);

  Planner(const Planner&) = delete;
  Planner& operator=(const Planner&) = delete;

  // The smallest legal cache: one layer's top-k, in every layer if each has its own share.
  static int64_t MinSlots(int32_t num_layers, int32_t top_k, CacheScope scope);

  // Plans `layer` for the routed `expert_ids` [num_tokens * k]; repeated ids are one row. Missing
  // experts of wave 0 are assigned their slots (state kPosted); later ones by Advance. If there are
  // more misses than slots to take, the rows form waves. A plan of more than kMaxDecodeTokens
  // tokens takes at most `staging_slots` slots from resident experts, so that a long prompt does
  // not wash out the cache. `now` must be larger than in every earlier call. The plan is valid
  // until the next call. Returns nullptr if transfers in flight hold every slot that the layer may
  // take: wait or cancel, and call again. Throws std::out_of_range for a layer or an expert id that
  // the model does not have.
  const Plan* PlanLayer(int32_t layer, std::span<const int64_t> expert_ids, int32_t num_tokens,
                        Tick now);

  // Row `row` is no longer needed: assigns its slot to the row that waits for it, and returns that
  // row, or kNoRow.
  int32_t Advance(int32_t row);

  // A slot for an expert that is foreseen to be needed until tick `needed_at`: assigned (kPosted,
  // marked unused). SlotId::kNone if it is resident or in flight already, if the current plan needs
  // it (its row may still wait for a slot), or if no slot may be taken (current plan, in flight, or
  // predicted itself).
  SlotId PlanPrefetch(ExpertId expert, Tick now, Tick needed_at);

  // The transfer into `slot` has started; has ended and the expert is ready; failed or was dropped,
  // and the slot is empty again: what was copied of a prefetch is wasted.
  void Submit(SlotId slot);
  void Publish(SlotId slot);
  void Drop(SlotId slot, size_t copied_bytes = 0);

  // The prefetch into `slot` is taken back before any of it was copied, and no plan needs it. What
  // it had replaced is still there, and resident again, unless it is elsewhere by now or the
  // current plan brings it; then the slot is empty. The eviction stays counted, and what it had
  // replaced as wasted if that was a prefetch without a use.
  void Withdraw(SlotId slot);

  // An expert that PlanPrefetch has protected gives its slot up for another, which PlanPrefetch is
  // then given it for. Returns whether it may at tick `now`, and the other can use it: it is
  // neither resident nor the current plan's. If not, it stays protected.
  bool Unprotect(ExpertId expert, Tick now, ExpertId other);

  // Hits, late hits, misses, evictions and wasted prefetches are counted here (an eviction on the
  // layer of the evicted expert); bytes and times by whoever moves the experts.
  LayerStatistics& statistics(int32_t layer) { return statistics_[static_cast<size_t>(layer)]; }
  std::vector<LayerStatistics>& statistics() { return statistics_; }
  const std::vector<LayerStatistics>& statistics() const { return statistics_; }
  void ResetStatistics() { std::ranges::fill(statistics_, LayerStatistics{}); }

  // From its next plan on, what PolicyKind::kPredictedNeed foresees for the experts of `layer`
  // counts that much more, in the units of its scores: MissCosts says how much. The planner kernel
  // has no such bias: it decides alike where none is set.
  void set_layer_bias(int32_t layer, int32_t bias) {
    layer_bias_[static_cast<size_t>(layer)] = bias;
  }

  // How many resident experts a long prompt may displace: enough to keep a link busy while experts
  // that have arrived are computed, as measured (bench/cuda/prefill.py); more gains nothing.
  static constexpr int32_t kMaxStagingSlots = 16;
  int32_t staging_slots(int32_t layer) const;

 private:
  struct Replaced {
    ExpertIndex expert = ExpertIndex::kNone;
    int64_t key = kEmptyKey;
    Tick needed = kNever;
  };

  void CollectDistinct(int32_t layer, std::span<const int64_t> expert_ids);
  int32_t AppendRows(int32_t layer, RowState state);
  // Fills `candidates_` with the `count` slots of the layer to take first, in order, and returns
  // how many there are. Never slots in flight or of the current plan, nor, if asked to, predicted
  // ones.
  int32_t SelectVictims(int32_t layer, int32_t count, Tick now, bool spare_predicted);
  // How many of `candidates_` a prompt may take: those that hold nothing of worth, or the staging
  // slots.
  int32_t LimitToStaging(int32_t layer) const;
  template <class Policy>
  int32_t Scan(SlotRange range, int32_t count, Tick now, bool spare_predicted);
  void ObserveNeeds(int32_t layer);
  void RecordUse(SlotId slot);
  void PlaceMisses(int32_t first_miss, int32_t num_taken);
  void AssignRow(PlanRow& row);
  bool IsInPlan(ExpertId expert) const;
  void DropResidents();

  PlannerConfig config_;
  SlotTableView table_;
  DecayedFrequency::Log2Table log2_table_;
  std::vector<int32_t> layer_bias_;        // [num_layers]
  std::unique_ptr<NeedModel> need_model_;  // of PolicyKind::kPredictedNeed, unless led
  const NeedModel* leader_needs_ = nullptr;
  int32_t observed_layer_ = -1;  // of a plan that found no slot: its routes come once more
  std::vector<LayerStatistics> statistics_;  // [num_layers]
  PlanningView planning_;
  Plan plan_;
  std::vector<PlanRow> rows_;      // [num_experts], the plan's rows
  std::vector<int32_t> distinct_;  // [num_experts] the layer's experts in order of first appearance
  std::vector<int64_t>
      seen_by_;  // [num_experts] the `collections_` count when the expert was last seen
  int64_t collections_ = 1;
  std::vector<Candidate> candidates_;  // [num_slots]
  std::vector<Replaced> replaced_;     // [num_slots] by the slot's last prefetch
};

}  // namespace expertflow
