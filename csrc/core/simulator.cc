#include "core/simulator.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "core/simulation/transition_predictor.h"

namespace expertflow {
namespace {

PlannerConfig MakePlannerConfig(const TraceView& trace, const SimulatorConfig& config) {
  return {.top_k = trace.top_k,
          .expert_bytes = config.expert_bytes,
          .policy = config.belady ? PolicyKind::kLru : config.policy,
          .scope = config.scope};
}

std::unique_ptr<StepPredictor> MakePredictor(PredictorKind kind, const TraceView& trace) {
  switch (kind) {
    case PredictorKind::kNone:
      return nullptr;
    case PredictorKind::kOracle:
      return std::make_unique<OraclePredictor>(trace);
    case PredictorKind::kRecorded:
      return std::make_unique<RecordedPredictor>(trace);
    case PredictorKind::kTransition:
      return std::make_unique<TransitionPredictor>(trace, Simulator::kMaxHorizon);
  }
  return nullptr;
}

}  // namespace

PredictorKind ParsePredictor(std::string_view name) {
  if (name == "none") return PredictorKind::kNone;
  if (name == "oracle") return PredictorKind::kOracle;
  if (name == "trace") return PredictorKind::kRecorded;
  if (name == "transition") return PredictorKind::kTransition;
  throw std::invalid_argument("predictor '" + std::string(name) +
                              "' is unknown: use none, oracle, trace or transition");
}

Simulator::Simulator(const TraceView& trace, const SimulatorConfig& config)
    : trace_(trace),
      config_(config),
      table_(trace.num_layers, trace.num_experts, config.num_slots),
      planner_(table_, MakePlannerConfig(trace, config)),
      transfers_(table_, planner_, config.expert_bytes, config.chunk_bytes, config.link),
      scheduler_(
          {.max_horizon = kMaxHorizon, .top_k = trace.top_k, .expert_bytes = config.expert_bytes}),
      ledger_(table_.view()),
      predictor_(MakePredictor(config.predictor, trace)) {
  CheckTrace(trace);
  if (config.layer_time_ns < 0 || !(config.expert_share >= 0.0 && config.expert_share <= 1.0)) {
    throw std::invalid_argument(
        "a layer's time must not be negative, and the experts' share of it must be in [0, 1]");
  }
  if (config.horizon < SimulatorConfig::kAutoHorizon || config.horizon > kMaxHorizon) {
    throw std::invalid_argument("horizon must be auto or 0 to " + std::to_string(kMaxHorizon));
  }
  if (config.warmup_tokens < 0 || config.warmup_tokens >= trace.num_tokens) {
    throw std::invalid_argument("a warm-up of " + std::to_string(config.warmup_tokens) +
                                " tokens leaves nothing of a trace of " +
                                std::to_string(trace.num_tokens));
  }
  if (config.belady) next_uses_.emplace(trace);
  routed_.resize(static_cast<size_t>(trace.top_k));
}

SimulationResult Simulator::RunAll() {
  while (!is_done()) RunToken();
  return result();
}

SimulationResult Simulator::result() const {
  SimulationResult result = counts_;
  result.num_tokens = std::max<int64_t>(step_ / trace_.num_layers - config_.warmup_tokens, 0);
  for (const LayerStatistics& layer : planner_.statistics()) result.counts += layer;
  result.counts.stall_us = static_cast<double>(result.stall_ns) * 1e-3;
  return result;
}

void Simulator::RunToken() {
  if (step_ == config_.warmup_tokens * trace_.num_layers) ResetCounts();
  for (int32_t layer = 0; layer < trace_.num_layers; ++layer) RunLayer();
}

void Simulator::ResetCounts() {
  planner_.ResetStatistics();
  counts_ = {};
  observed_ = {};
}

void Simulator::RunLayer() {
  const int64_t expert_ns =
      std::llround(static_cast<double>(config_.layer_time_ns) * config_.expert_share);
  now_ns_ += config_.layer_time_ns - expert_ns;
  transfers_.AdvanceTo(now_ns_);
  std::ranges::copy(trace_.experts(step_), routed_.begin());
  const int32_t layer = trace_.LayerOf(step_);
  const Plan& plan = PlanLayer(layer);
  PostMisses(plan);
  if (predictor_) {
    predictor_->Learn(step_);
    Prefetch(plan);
  }
  ComputeExperts(plan);
  ++step_;
}

const Plan& Simulator::PlanLayer(int32_t layer) {
  const Tick tick = step_ + 1;
  const Plan* plan = planner_.PlanLayer(layer, routed_, /*num_tokens=*/1, tick);
  if (plan == nullptr) {  // transfers hold every slot
    const int64_t free_ns = transfers_.CancelAll(now_ns_);
    counts_.stall_ns += free_ns - now_ns_;
    now_ns_ = free_ns;
    plan = planner_.PlanLayer(layer, routed_, /*num_tokens=*/1, tick);
  }
  if (next_uses_) {
    next_uses_->Pass(step_);
    for (const PlanRow& row : plan->rows) RankByNextUse(row.slot);
  }
  return *plan;
}

// Belady: the planner's LRU evicts the smallest key, so a key that falls with the next use makes it
// evict what is needed last.
void Simulator::RankByNextUse(SlotId slot) {
  const SlotTableView& table = table_.view();
  const ExpertIndex expert = table.slot_expert[Index(slot)];
  if (expert == ExpertIndex::kNone) return;  // a later wave takes it over
  const int64_t next_step = next_uses_->NextStep(expert);
  table.slot_key[Index(slot)] = next_step == NextUses::kNoMore ? 0 : trace_.num_steps() - next_step;
}

void Simulator::PostMisses(const Plan& plan) {
  for (const PlanRow& row : plan.rows) {
    if (row.state == RowState::kLoading) transfers_.Promote(row.slot, plan.tick);
    if (row.state == RowState::kMiss && row.wave == 0) {
      transfers_.Post(row.slot, TransferClass::kDemand, plan.tick, now_ns_);
    }
  }
}

LayerObservation Simulator::Observe(const Plan& plan, const PrefetchLedger::Counts& prefetched) {
  const auto num_rows = static_cast<int32_t>(plan.rows.size());
  const auto before = observed_;
  observed_ = {counts_.stall_ns, counts_.late_stall_ns, {}};
  for (const LayerStatistics& layer : planner_.statistics()) observed_.counts += layer;
  const LayerStatistics& now = observed_.counts;
  const int64_t moved_bytes = now.demand_bytes + now.prefetch_bytes - before.counts.demand_bytes -
                              before.counts.prefetch_bytes;
  const auto to_us = [](int64_t ns) { return static_cast<double>(ns) * 1e-3; };
  return {.compute_us = to_us(config_.layer_time_ns),
          .stall_us = to_us(observed_.stall_ns - before.stall_ns),
          .late_stall_us = to_us(observed_.late_stall_ns - before.late_stall_ns),
          .num_fetched = num_rows - plan.num_hits + prefetched.ready,
          .num_prefetch_used = prefetched.used,
          .num_prefetch_wasted = prefetched.wasted,
          .num_prefetch_regretted = prefetched.regretted,
          .moved_bytes = static_cast<double>(moved_bytes),
          .bytes_per_second = transfers_.measured_bytes_per_second(),
          .queued_bytes = static_cast<double>(transfers_.queue().queued_bytes())};
}

void Simulator::Prefetch(const Plan& plan) {
  ledger_.RecordPlan(plan);
  const PrefetchLedger::Counts prefetched = ledger_.TakeCounts();
  counts_.prefetch_hits += prefetched.ready;
  horizon_ = config_.horizon == SimulatorConfig::kAutoHorizon
                 ? scheduler_.BeginLayer(Observe(plan, prefetched))
                 : config_.horizon;
  counts_.horizon_sum += horizon_;
  predictions_.clear();
  predictor_->Predict(step_, horizon_, predictions_);
  if (config_.horizon != SimulatorConfig::kAutoHorizon) KeepTopK();
  // First all that is resident is protected, so that no prefetch takes the slot of another.
  for (const Prediction& prediction : predictions_) {
    if (IsResident(prediction) && IsExpected(prediction)) PlanPrefetch(prediction);
  }
  for (const Prediction& prediction : predictions_) {
    if (!IsResident(prediction) && IsWanted(prediction)) PlanPrefetch(prediction);
  }
}

ExpertId Simulator::ExpertOf(const Prediction& prediction) const {
  return {trace_.LayerOf(step_ + prediction.distance), prediction.expert};
}

bool Simulator::IsResident(const Prediction& prediction) const {
  const ExpertIndex expert = ToIndex(table_.view(), ExpertOf(prediction));
  return table_.view().expert_slot[Index(expert)] != SlotId::kNone;
}

bool Simulator::IsExpected(const Prediction& prediction) const {
  return config_.horizon != SimulatorConfig::kAutoHorizon || scheduler_.Expects(prediction);
}

bool Simulator::IsWanted(const Prediction& prediction) const {
  if (config_.horizon != SimulatorConfig::kAutoHorizon) return true;
  const Tick needed_at = step_ + 1 + prediction.distance;
  const size_t bytes_ahead = transfers_.queue().prefetch_bytes_until(needed_at);
  return scheduler_.Admits(prediction, static_cast<double>(bytes_ahead));
}

void Simulator::PlanPrefetch(const Prediction& prediction) {
  const Tick now = step_ + 1;
  const Tick needed_at = now + prediction.distance;
  const SlotId slot = planner_.PlanPrefetch(ExpertOf(prediction), now, needed_at);
  if (slot == SlotId::kNone) return;
  ledger_.RecordPrefetch(slot, ExpertOf(prediction), now);
  if (next_uses_) RankByNextUse(slot);
  transfers_.Post(slot, TransferClass::kPrefetch, needed_at, now_ns_);
}

// A fixed horizon knows no need: it takes as many experts of each layer as a token uses.
void Simulator::KeepTopK() {
  int32_t distance = 0;
  size_t place = 0;
  std::erase_if(predictions_, [&](const Prediction& prediction) {
    place = prediction.distance == distance ? place + 1 : 0;
    distance = prediction.distance;
    return place >= routed_.size();
  });
}

void Simulator::ComputeExperts(const Plan& plan) {
  const int64_t expert_ns =
      std::llround(static_cast<double>(config_.layer_time_ns) * config_.expert_share);
  const auto num_rows = static_cast<int64_t>(plan.rows.size());
  for (int64_t r = 0; r < num_rows; ++r) {
    const PlanRow row = plan.rows[static_cast<size_t>(r)];
    const int64_t ready_ns = transfers_.WaitUntilReady(row.slot, now_ns_);
    counts_.stall_ns += ready_ns - now_ns_;
    if (row.state == RowState::kLoading) counts_.late_stall_ns += ready_ns - now_ns_;
    now_ns_ = ready_ns + expert_ns * (r + 1) / num_rows - expert_ns * r / num_rows;
    const int32_t next = planner_.Advance(static_cast<int32_t>(r));
    if (next == kNoRow) continue;
    const SlotId slot = plan.rows[static_cast<size_t>(next)].slot;
    if (next_uses_) RankByNextUse(slot);
    transfers_.Post(slot, TransferClass::kDemand, plan.tick, now_ns_);
  }
}

}  // namespace expertflow
