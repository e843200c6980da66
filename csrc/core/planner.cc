#include "core/planner.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace expertflow {

PlanningView MakePlanningView(const PlannerConfig& config, const SlotTableView& table,
                              const int32_t* log2_table, LayerStatistics* statistics) {
  if (config.top_k <= 0 || config.top_k > table.num_experts) {
    throw std::invalid_argument("top_k is " + std::to_string(config.top_k) + ", but a layer has " +
                                std::to_string(table.num_experts) + " experts");
  }
  const int64_t min_slots = Planner::MinSlots(table.num_layers, config.top_k, config.scope);
  if (table.num_slots < min_slots) {
    throw std::invalid_argument("the expert cache holds " + std::to_string(table.num_slots) +
                                " experts, but needs at least " + std::to_string(min_slots));
  }
  if (!(config.decay_per_token > 0.0 && config.decay_per_token <= 1.0)) {
    throw std::invalid_argument("decay must be in (0, 1], not " +
                                std::to_string(config.decay_per_token));
  }
  return {.table = table,
          .eviction = {ProtectedTicks(config.scope, table.num_layers),
                       DecayedFrequency::DecayPerTickQ24(config.decay_per_token, table.num_layers),
                       log2_table},
          .statistics = statistics,
          .policy = config.policy,
          .scope = config.scope,
          .expert_bytes = static_cast<int64_t>(config.expert_bytes)};
}

Planner::Planner(SlotTable& table, const PlannerConfig& config, const Planner* leader)
    : config_(config),
      table_(table.view()),
      log2_table_(DecayedFrequency::MakeLog2Table()),
      statistics_(static_cast<size_t>(table_.num_layers)),
      planning_(MakePlanningView(config, table_, log2_table_.data(), statistics_.data())) {
  if (leader != nullptr) {
    leader_needs_ = leader->need_model_.get();
  } else if (config.policy == PolicyKind::kPredictedNeed) {
    need_model_ = std::make_unique<NeedModel>(table_.num_layers, table_.num_experts, config.top_k,
                                              table_.num_slots);
  }
  const auto num_experts = static_cast<size_t>(table_.num_experts);
  layer_bias_.assign(static_cast<size_t>(table_.num_layers), 0);
  rows_.resize(num_experts);
  distinct_.reserve(num_experts);
  seen_by_.assign(num_experts, 0);
  candidates_.reserve(static_cast<size_t>(table_.num_slots) + 1);
  replaced_.resize(static_cast<size_t>(table_.num_slots));
}

int64_t Planner::MinSlots(int32_t num_layers, int32_t top_k, CacheScope scope) {
  return scope == CacheScope::kLayer ? int64_t{num_layers} * top_k : top_k;
}

int32_t Planner::staging_slots(int32_t layer) const {
  const SlotRange range = RangeOf(planning_, layer);
  return std::max(config_.top_k, std::min(kMaxStagingSlots, (range.end - range.begin) / 8));
}

const Plan* Planner::PlanLayer(int32_t layer, std::span<const int64_t> expert_ids,
                               int32_t num_tokens, Tick now) {
  if (layer < 0 || layer >= table_.num_layers) {
    throw std::out_of_range("MoE layer " + std::to_string(layer) + " is not one of 0 to " +
                            std::to_string(table_.num_layers - 1));
  }
  CollectDistinct(layer, expert_ids);
  if (config_.policy == PolicyKind::kOnDemand) DropResidents();

  const auto num_rows = static_cast<int32_t>(distinct_.size());
  plan_ = {.layer = layer,
           .tick = now,
           .streaming = num_tokens > kMaxDecodeTokens,
           .rows = {rows_.data(), static_cast<size_t>(num_rows)}};
  plan_.num_hits = AppendRows(layer, RowState::kHit);
  plan_.num_loading = AppendRows(layer, RowState::kLoading);
  const int32_t num_resident = plan_.num_hits + plan_.num_loading;
  for (const PlanRow& row : plan_.rows.first(static_cast<size_t>(num_resident))) {
    table_.slot_needed[Index(row.slot)] = now;
  }
  if ((need_model_ || leader_needs_ != nullptr) && !plan_.streaming) ObserveNeeds(layer);
  int32_t num_taken = 0;
  if (num_rows > num_resident) {
    num_taken = SelectVictims(layer, num_rows - num_resident, now, /*spare_predicted=*/false);
    if (plan_.streaming) num_taken = LimitToStaging(layer);
    if (num_taken == 0 && num_resident == 0) {
      if (!plan_.streaming) observed_layer_ = layer;
      return nullptr;
    }
    AppendRows(layer, RowState::kMiss);
  }
  for (const PlanRow& row : plan_.rows.first(static_cast<size_t>(num_resident)))
    RecordUse(row.slot);
  PlaceMisses(num_resident, num_taken);
  LayerStatistics& counts = statistics(layer);
  counts.hits += plan_.num_hits;
  counts.late_hits += plan_.num_loading;
  counts.misses += num_rows - num_resident;
  return &plan_;
}

void Planner::CollectDistinct(int32_t layer, std::span<const int64_t> expert_ids) {
  distinct_.clear();
  ++collections_;
  for (const int64_t id : expert_ids) {
    if (id < 0 || id >= table_.num_experts) {
      throw std::out_of_range("expert id " + std::to_string(id) + " in MoE layer " +
                              std::to_string(layer) + " is not one of 0 to " +
                              std::to_string(table_.num_experts - 1));
    }
    int64_t& seen_by = seen_by_[static_cast<size_t>(id)];
    if (seen_by == collections_) continue;
    seen_by = collections_;
    distinct_.push_back(static_cast<int32_t>(id));
  }
}

int32_t Planner::AppendRows(int32_t layer, RowState state) {
  auto row = static_cast<size_t>(plan_.num_hits + plan_.num_loading);
  const size_t first = row;
  for (const int32_t expert : distinct_) {
    const SlotId slot = table_.expert_slot[Index(ToIndex(table_, {layer, expert}))];
    if (StateOfRow(table_, slot) == state) rows_[row++] = {expert, slot, state, 0, kNoRow};
  }
  return static_cast<int32_t>(row - first);
}

int32_t Planner::SelectVictims(int32_t layer, int32_t count, Tick now, bool spare_predicted) {
  const SlotRange range = RangeOf(planning_, layer);
  return WithPolicy(config_.policy, [&]<class Policy>(Policy) {
    return Scan<Policy>(range, count, now, spare_predicted);
  });
}

int32_t Planner::LimitToStaging(int32_t layer) const {
  const auto is_resident = [](const Candidate& c) { return c.rank >= 0; };
  const auto num_free = std::ranges::find_if(candidates_, is_resident) - candidates_.begin();
  const auto limit = std::max(num_free, ptrdiff_t{staging_slots(layer)});
  return static_cast<int32_t>(std::min(std::ssize(candidates_), limit));
}

template <class Policy>
int32_t Planner::Scan(SlotRange range, int32_t count, Tick now, bool spare_predicted) {
  constexpr int32_t kInsertionLimit = 16;
  candidates_.clear();
  const auto limit = static_cast<size_t>(count);
  int64_t worst = std::numeric_limits<int64_t>::max();
  for (int32_t s = range.begin; s < range.end; ++s) {
    if (table_.slot_key[s] >= worst) continue;  // most slots: a rank is never below its key
    if (!MayTake(table_, s, now, spare_predicted)) continue;
    const int64_t rank = RankOf<Policy>(planning_.eviction, UseOf(table_, s), now);
    if (rank >= worst) continue;
    if (count > kInsertionLimit) {
      candidates_.push_back({rank, s});
      continue;
    }
    const auto at = std::upper_bound(candidates_.begin(), candidates_.end(), Candidate{rank, s});
    candidates_.insert(at, {rank, s});
    if (candidates_.size() > limit) candidates_.pop_back();
    if (candidates_.size() == limit) worst = candidates_.back().rank;
  }
  if (count > kInsertionLimit) {
    const size_t kept = std::min(limit, candidates_.size());
    std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<ptrdiff_t>(kept),
                      candidates_.end());
    candidates_.resize(kept);
  }
  return static_cast<int32_t>(candidates_.size());
}

void Planner::ObserveNeeds(int32_t layer) {
  const bool is_new = layer != observed_layer_;
  observed_layer_ = -1;
  if (!is_new) return;
  const int32_t* scores = leader_needs_ != nullptr ? leader_needs_->scores(layer)
                                                   : need_model_->Observe(layer, distinct_);
  const int32_t bias = layer_bias_[static_cast<size_t>(layer)];
  for (int32_t e = 0; e < table_.num_experts; ++e) {
    PredictedNeed::RecordScore(table_, ToIndex(table_, {layer, e}), scores[e] + bias);
  }
}

void Planner::RecordUse(SlotId slot) {
  const ExpertIndex expert = table_.slot_expert[Index(slot)];
  const int64_t key = KeyOnUse(planning_, table_.expert_key[Index(expert)], plan_.tick);
  expertflow::RecordUse(planning_, slot, expert, key, plan_.tick, plan_.streaming);
}

void Planner::PlaceMisses(int32_t first_miss, int32_t num_taken) {
  // With no slot to take, misses follow the plan's own resident rows into their slots.
  const int32_t num_lanes = num_taken > 0 ? num_taken : first_miss;
  const int32_t first_wave = num_taken > 0 ? 0 : 1;
  for (int32_t r = first_miss; r < static_cast<int32_t>(plan_.rows.size()); ++r) {
    PlanRow& row = rows_[static_cast<size_t>(r)];
    const int32_t miss = r - first_miss;
    row.wave = first_wave + miss / num_lanes;
    if (row.wave == 0) {
      row.slot = static_cast<SlotId>(candidates_[static_cast<size_t>(miss)].slot);
      AssignRow(row);
    } else {
      const int32_t previous = r - num_lanes;
      row.slot = rows_[static_cast<size_t>(previous)].slot;
      rows_[static_cast<size_t>(previous)].next_row = r;
    }
    plan_.num_waves = row.wave + 1;
  }
}

void Planner::AssignRow(PlanRow& row) {
  const ExpertIndex expert = ToIndex(table_, {plan_.layer, row.expert});
  const int64_t key = KeyOnUse(planning_, table_.expert_key[Index(expert)], plan_.tick);
  PlaceMiss(planning_, row.slot, OccupantOf(planning_, row.slot), expert, key, plan_.tick,
            plan_.streaming, AddPlainly());
}

int32_t Planner::Advance(int32_t row) {
  const int32_t next = plan_.rows[static_cast<size_t>(row)].next_row;
  if (next == kNoRow) return kNoRow;
  rows_[static_cast<size_t>(row)].next_row = kNoRow;
  AssignRow(rows_[static_cast<size_t>(next)]);
  return next;
}

SlotId Planner::PlanPrefetch(ExpertId expert, Tick now, Tick needed_at) {
  if (expert.layer < 0 || expert.layer >= table_.num_layers || expert.expert < 0 ||
      expert.expert >= table_.num_experts) {
    throw std::out_of_range("expert " + std::to_string(expert.expert) + " of MoE layer " +
                            std::to_string(expert.layer) + " does not exist");
  }
  const ExpertIndex index = ToIndex(table_, expert);
  const SlotId resident = table_.expert_slot[Index(index)];
  if (resident != SlotId::kNone) {
    Tick& predicted = table_.slot_predicted[Index(resident)];
    predicted = std::max(predicted, needed_at);
    return SlotId::kNone;
  }
  if (IsInPlan(expert)) return SlotId::kNone;
  if (SelectVictims(expert.layer, 1, now, /*spare_predicted=*/true) == 0) return SlotId::kNone;
  const auto slot = static_cast<SlotId>(candidates_.front().slot);
  const int32_t s = Index(slot);
  replaced_[static_cast<size_t>(s)] = {table_.slot_expert[s], table_.slot_key[s],
                                       table_.slot_needed[s]};
  Replace(planning_, slot, OccupantOf(planning_, slot), index, AddPlainly());
  table_.slot_key[s] = KeyOnUse(planning_, table_.expert_key[Index(index)], now);
  table_.slot_predicted[s] = needed_at;
  table_.slot_unused[s] = 1;
  return slot;
}

bool Planner::Unprotect(ExpertId expert, Tick now, ExpertId other) {
  if (table_.expert_slot[Index(ToIndex(table_, other))] != SlotId::kNone) return false;
  if (IsInPlan(other)) return false;
  const SlotId slot = table_.expert_slot[Index(ToIndex(table_, expert))];
  if (slot == SlotId::kNone || !MayTake(table_, Index(slot), now, /*spare_predicted=*/false)) {
    return false;
  }
  const SlotRange range = RangeOf(planning_, other.layer);
  if (Index(slot) < range.begin || Index(slot) >= range.end) return false;
  table_.slot_predicted[Index(slot)] = kNever;
  return true;
}

bool Planner::IsInPlan(ExpertId expert) const {
  return expert.layer == plan_.layer &&
         seen_by_[static_cast<size_t>(expert.expert)] == collections_;
}

void Planner::Submit(SlotId slot) { table_.slot_state[Index(slot)] = SlotState::kSubmitted; }

void Planner::Publish(SlotId slot) { table_.slot_state[Index(slot)] = SlotState::kReady; }

void Planner::Drop(SlotId slot, size_t copied_bytes) {
  if (table_.slot_unused[Index(slot)]) {
    const ExpertIndex expert = table_.slot_expert[Index(slot)];
    statistics(ToId(table_, expert).layer).wasted_prefetch_bytes +=
        static_cast<int64_t>(copied_bytes);
  }
  // A row of the current plan whose transfer failed keeps its slot: a prefetch must not take it.
  const Tick needed = table_.slot_needed[Index(slot)];
  Unassign(table_, slot);
  table_.slot_needed[Index(slot)] = needed;
}

void Planner::Withdraw(SlotId slot) {
  Drop(slot);
  const Replaced replaced = replaced_[static_cast<size_t>(Index(slot))];
  if (replaced.expert == ExpertIndex::kNone) return;
  if (table_.expert_slot[Index(replaced.expert)] != SlotId::kNone) return;
  if (IsInPlan(ToId(table_, replaced.expert))) return;
  Assign(table_, slot, replaced.expert);
  Publish(slot);
  table_.slot_key[Index(slot)] = replaced.key;
  table_.slot_needed[Index(slot)] = replaced.needed;
}

void Planner::DropResidents() {
  for (int32_t s = 0; s < table_.num_slots; ++s) {
    DropIfReady(planning_, static_cast<SlotId>(s), AddPlainly());
  }
}

}  // namespace expertflow
