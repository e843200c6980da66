// The planner's rules said once more, with maps and sorting instead of flat arrays and scans.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "core/eviction/decayed_frequency.h"
#include "core/eviction/need_model.h"
#include "core/planner.h"

namespace expertflow {

class ReferencePlanner {
 public:
  struct Slot {
    std::optional<ExpertId> expert;
    bool in_flight = false;
    bool streamed = false;
    bool unused = false;
    int64_t key = 0;
    Tick needed = kNever;
    Tick predicted = kNever;
  };

  ReferencePlanner(int32_t num_layers, int32_t num_experts, int32_t num_slots,
                   const PlannerConfig& config)
      : num_layers_(num_layers),
        config_(config),
        need_model_(num_layers, num_experts, config.top_k, num_slots),
        slots_(static_cast<size_t>(num_slots)) {}

  ReferencePlanner(const ReferencePlanner&) = delete;
  ReferencePlanner& operator=(const ReferencePlanner&) = delete;

  // The rows of the plan, or nothing if every slot that the layer may take is in flight.
  std::optional<std::vector<PlanRow>> PlanLayer(int32_t layer, std::span<const int64_t> expert_ids,
                                                int32_t num_tokens, Tick now) {
    if (config_.policy == PolicyKind::kOnDemand) DropReady();
    std::vector<PlanRow> hits, late_hits, misses;
    std::set<int64_t> seen;
    for (const int64_t id : expert_ids) {
      if (!seen.insert(id).second) continue;
      const auto expert = static_cast<int32_t>(id);
      const SlotId slot = SlotOf({layer, expert});
      if (slot == SlotId::kNone) {
        misses.push_back({expert, slot, RowState::kMiss, 0, kNoRow});
      } else if (At(slot).in_flight) {
        late_hits.push_back({expert, slot, RowState::kLoading, 0, kNoRow});
      } else {
        hits.push_back({expert, slot, RowState::kHit, 0, kNoRow});
      }
    }
    std::vector<PlanRow> rows = hits;
    rows.insert(rows.end(), late_hits.begin(), late_hits.end());
    std::set<SlotId> taken;
    for (const PlanRow& row : rows) taken.insert(row.slot);

    const bool streaming = num_tokens > kMaxDecodeTokens;
    ObserveNeeds(layer, expert_ids, streaming);
    std::vector<SlotId> victims = Victims(layer, now, taken, /*spare_predicted=*/false);
    if (victims.size() > misses.size()) victims.resize(misses.size());
    if (streaming) LimitToStaging(now, victims);
    if (!misses.empty() && victims.empty() && rows.empty()) {
      if (!streaming) observed_layer_ = layer;
      return std::nullopt;
    }

    layer_ = layer;
    now_ = now;
    streaming_ = streaming;
    const bool reuses_hits = victims.empty();
    if (reuses_hits) {
      for (const PlanRow& row : rows) victims.push_back(row.slot);
    }
    for (const PlanRow& row : rows) Use(row.slot);
    std::map<SlotId, int32_t> last_row_of;  // of a slot
    for (size_t r = 0; reuses_hits && r < rows.size(); ++r) {
      last_row_of[rows[r].slot] = static_cast<int32_t>(r);
    }
    for (size_t m = 0; m < misses.size(); ++m) {
      PlanRow row = misses[m];
      row.slot = victims[m % victims.size()];
      row.wave = static_cast<int32_t>(m / victims.size()) + (reuses_hits ? 1 : 0);
      const auto r = static_cast<int32_t>(rows.size());
      const auto previous = last_row_of.find(row.slot);
      if (previous != last_row_of.end()) rows[static_cast<size_t>(previous->second)].next_row = r;
      last_row_of[row.slot] = r;
      rows.push_back(row);
      if (row.wave == 0) Place(row);
    }
    rows_ = rows;
    return rows;
  }

  int32_t Advance(int32_t row) {
    const int32_t next = std::exchange(rows_[static_cast<size_t>(row)].next_row, kNoRow);
    if (next != kNoRow) Place(rows_[static_cast<size_t>(next)]);
    return next;
  }

  SlotId PlanPrefetch(ExpertId expert, Tick now, Tick needed_at) {
    const SlotId resident = SlotOf(expert);
    if (resident != SlotId::kNone) {
      At(resident).predicted = std::max(At(resident).predicted, needed_at);
      return SlotId::kNone;
    }
    const auto is_row = [&](const PlanRow& row) { return ExpertId{layer_, row.expert} == expert; };
    if (std::ranges::any_of(rows_, is_row)) return SlotId::kNone;
    const std::vector<SlotId> victims = Victims(expert.layer, now, {}, /*spare_predicted=*/true);
    if (victims.empty()) return SlotId::kNone;
    Evict(victims.front());
    Slot& s = At(victims.front());
    replaced_[victims.front()] = s;
    s = Slot{};
    s.expert = expert;
    s.in_flight = true;
    s.unused = true;
    s.key = KeyOnUse(expert, now);
    s.predicted = needed_at;
    return victims.front();
  }

  void Publish(SlotId slot) { At(slot).in_flight = false; }
  void Drop(SlotId slot) {
    const Tick needed = At(slot).needed;  // the plan's row keeps its slot
    At(slot) = Slot{};
    At(slot).needed = needed;
  }

  void Withdraw(SlotId slot) {
    Drop(slot);
    Slot replaced = replaced_.at(slot);
    if (!replaced.expert || SlotOf(*replaced.expert) != SlotId::kNone) return;
    const auto is_row = [&](const PlanRow& row) {
      return ExpertId{layer_, row.expert} == *replaced.expert;
    };
    if (std::ranges::any_of(rows_, is_row)) return;
    replaced.unused = false;
    replaced.predicted = kNever;
    At(slot) = replaced;
  }

  const Slot& slot(SlotId slot) const { return slots_[static_cast<size_t>(Index(slot))]; }
  const LayerStatistics& statistics(int32_t layer) { return statistics_[layer]; }

  SlotId SlotOf(ExpertId expert) const {
    for (size_t s = 0; s < slots_.size(); ++s) {
      if (slots_[s].expert == expert) return static_cast<SlotId>(s);
    }
    return SlotId::kNone;
  }

  int32_t staging_slots() const {
    const auto num_slots = static_cast<int32_t>(slots_.size());
    const bool shared = config_.scope == CacheScope::kGlobal;
    const int32_t eighth = (shared ? num_slots : num_slots / num_layers_) / 8;
    return std::max(config_.top_k, std::min(16, eighth));
  }

  bool MayTake(int32_t layer, SlotId slot) const {
    const int32_t quota = static_cast<int32_t>(slots_.size()) / num_layers_;
    return config_.scope == CacheScope::kGlobal || Index(slot) / quota == layer;
  }

 private:
  // Empty slots, then what prompts left, then the unprotected, then the protected.
  using Rank = std::tuple<int, int64_t, SlotId>;

  Slot& At(SlotId slot) { return slots_[static_cast<size_t>(Index(slot))]; }

  Rank RankOf(SlotId id, Tick now) const {
    const Slot& s = slot(id);
    if (!s.expert) return {0, 0, id};
    const bool two_level = config_.policy == PolicyKind::kTwoLevelLru;
    const Tick protected_ticks = config_.scope == CacheScope::kLayer ? 1 : num_layers_;
    const bool just_used = !s.streamed && s.key > now - protected_ticks;
    if (two_level && (s.predicted >= now || just_used)) return {3, s.streamed ? -1 : s.key, id};
    if (s.streamed) return {1, 0, id};
    const bool by_need = config_.policy == PolicyKind::kPredictedNeed;
    if (by_need && s.predicted >= now) return {3, s.key, id};
    const bool by_frequency = config_.policy == PolicyKind::kDecayedFrequency;
    const bool protects = s.needed > now - protected_ticks || s.predicted >= now;
    if (by_frequency && protects) return {3, s.key, id};
    return {2, s.key, id};
  }

  std::vector<SlotId> Victims(int32_t layer, Tick now, const std::set<SlotId>& taken,
                              bool spare_predicted) const {
    std::vector<Rank> ranks;
    for (size_t i = 0; i < slots_.size(); ++i) {
      const auto id = static_cast<SlotId>(i);
      const Slot& s = slots_[i];
      if (!MayTake(layer, id) || s.in_flight || s.needed == now || taken.contains(id)) continue;
      if (spare_predicted && s.predicted >= now) continue;
      ranks.push_back(RankOf(id, now));
    }
    std::sort(ranks.begin(), ranks.end());
    std::vector<SlotId> victims;
    for (const Rank& rank : ranks) victims.push_back(std::get<SlotId>(rank));
    return victims;
  }

  void LimitToStaging(Tick now, std::vector<SlotId>& victims) const {
    const auto is_free = [&](SlotId slot) { return std::get<0>(RankOf(slot, now)) <= 1; };
    const auto num_free = static_cast<size_t>(std::ranges::count_if(victims, is_free));
    const size_t limit = std::max(num_free, static_cast<size_t>(staging_slots()));
    if (victims.size() > limit) victims.resize(limit);
  }

  int64_t KeyOnUse(ExpertId expert, Tick now) const {
    if (config_.policy == PolicyKind::kPredictedNeed) {
      return PredictedNeed::kKeyOfZero + need_model_.scores(expert.layer)[expert.expert];
    }
    if (config_.policy != PolicyKind::kDecayedFrequency) return now;
    const auto used = key_of_.find({expert.layer, expert.expert});
    return DecayedFrequency::KeyOnUse(params_, used == key_of_.end() ? kNeverUsed : used->second,
                                      now);
  }

  // A plan that found no slot comes again, with the same routes.
  void ObserveNeeds(int32_t layer, std::span<const int64_t> expert_ids, bool streaming) {
    if (streaming) return;
    const std::optional<int32_t> observed_layer = std::exchange(observed_layer_, std::nullopt);
    if (observed_layer == layer) return;
    std::vector<int32_t> distinct;
    for (const int64_t id : expert_ids) {
      const auto expert = static_cast<int32_t>(id);
      if (std::ranges::find(distinct, expert) == distinct.end()) distinct.push_back(expert);
    }
    need_model_.Observe(layer, distinct);
    if (config_.policy != PolicyKind::kPredictedNeed) return;
    for (Slot& s : slots_) {
      if (s.expert && s.expert->layer == layer && !s.streamed) s.key = KeyOnUse(*s.expert, 0);
    }
  }

  void Use(SlotId id) {
    Slot& s = At(id);
    s.needed = now_;
    s.unused = false;
    if (streaming_) return;
    s.streamed = false;
    s.key = key_of_[{s.expert->layer, s.expert->expert}] = KeyOnUse(*s.expert, now_);
  }

  void Place(const PlanRow& row) {
    Evict(row.slot);
    At(row.slot) = Slot{};
    At(row.slot).expert = ExpertId{layer_, row.expert};
    At(row.slot).in_flight = true;
    At(row.slot).streamed = true;
    Use(row.slot);
  }

  void Evict(SlotId id) {
    if (!slot(id).expert) return;
    LayerStatistics& counts = statistics_[slot(id).expert->layer];
    ++counts.evictions;
    if (slot(id).unused) {
      counts.wasted_prefetch_bytes += static_cast<int64_t>(config_.expert_bytes);
    }
  }

  void DropReady() {
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (!slots_[i].expert || slots_[i].in_flight) continue;
      Evict(static_cast<SlotId>(i));
      slots_[i] = Slot{};
    }
  }

  int32_t num_layers_;
  PlannerConfig config_;
  // The arithmetic of keys and scores is the planner's own; decayed_frequency_test and
  // need_model_test check it.
  NeedModel need_model_;
  std::optional<int32_t> observed_layer_;
  DecayedFrequency::Log2Table log2_table_ = DecayedFrequency::MakeLog2Table();
  EvictionParams params_{num_layers_,
                         DecayedFrequency::DecayPerTickQ24(config_.decay_per_token, num_layers_),
                         log2_table_.data()};
  std::vector<Slot> slots_;
  std::map<SlotId, Slot> replaced_;  // by the last prefetch into each
  std::map<std::pair<int32_t, int32_t>, int64_t> key_of_;
  std::map<int32_t, LayerStatistics> statistics_;
  std::vector<PlanRow> rows_;
  int32_t layer_ = 0;
  Tick now_ = kNever;
  bool streaming_ = false;
};

}  // namespace expertflow
