#include "core/simulator.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "core/simulation/ids_predictor.h"

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
    case PredictorKind::kIds:
      return std::make_unique<IdsPredictor>(trace, Simulator::kMaxHorizon);
  }
  return nullptr;
}

}  // namespace

PredictorKind ParsePredictor(std::string_view name) {
  if (name == "none") return PredictorKind::kNone;
  if (name == "oracle") return PredictorKind::kOracle;
  if (name == "trace") return PredictorKind::kRecorded;
  if (name == "ids") return PredictorKind::kIds;
  throw std::invalid_argument("predictor '" + std::string(name) +
                              "' is unknown: use none, oracle, trace or ids");
}

Simulator::Simulator(const TraceView& trace, const SimulatorConfig& config)
    : trace_(trace),
      config_(config),
      table_(trace.num_layers, trace.num_experts, config.num_slots),
      planner_(table_, MakePlannerConfig(trace, config)),
      transfers_(table_, planner_, config.expert_bytes, config.chunk_bytes,
                 config.demand_chunk_bytes, config.link),
      decoder_(planner_, transfers_,
               {.copy_slowdown = config.copy_slowdown, .miss_ns = config.miss_time_ns}),
      prefetcher_(table_.view(), planner_, transfers_.queue(), MakePlannerConfig(trace, config)),
      predictor_(MakePredictor(config.predictor, trace)) {
  CheckTrace(trace);
  if (config.layer_time_ns < 0 || !(config.expert_share >= 0.0 && config.expert_share <= 1.0)) {
    throw std::invalid_argument(
        "a layer's time must not be negative, and the experts' share of it must be in [0, 1]");
  }
  if (config.miss_time_ns < 0) {
    throw std::invalid_argument("a miss cannot save compute time: miss_time_ns is " +
                                std::to_string(config.miss_time_ns));
  }
  if (!(config.copy_slowdown >= 0.0 && std::isfinite(config.copy_slowdown))) {
    throw std::invalid_argument("copies cannot slow computation down by a share of " +
                                std::to_string(config.copy_slowdown));
  }
  prefetcher_.set_horizon(config.horizon);
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
  SimulationResult result;
  result.stall_ns = decoder_.stall_ns();
  result.late_stall_ns = decoder_.late_stall_ns();
  result.horizon_sum = horizon_sum_;
  result.num_tokens = std::max<int64_t>(trace_.TokenOf(step_) - config_.warmup_tokens, 0);
  for (const LayerStatistics& layer : planner_.statistics()) result.counts += layer;
  result.prefetch_hits = prefetcher_.statistics().hits;
  result.counts.stall_us = static_cast<double>(result.stall_ns) * 1e-3;
  return result;
}

void Simulator::RunToken() {
  if (step_ == config_.warmup_tokens * trace_.num_layers) ResetCounts();
  if (predictor_) PrefetchFirstLayers();
  for (int32_t layer = 0; layer < trace_.num_layers; ++layer) RunLayer();
}

int64_t Simulator::ExpertNs() const {
  return std::llround(static_cast<double>(config_.layer_time_ns) * config_.expert_share);
}

void Simulator::ResetCounts() {
  planner_.ResetStatistics();
  prefetcher_.ResetStatistics();
  decoder_.ResetStalls();
  horizon_sum_ = 0;
  observed_ = {.moved_bytes = transfers_.moved_bytes()};
}

void Simulator::RunLayer() {
  decoder_.Compute(config_.layer_time_ns - ExpertNs());
  transfers_.AdvanceTo(decoder_.now_ns());
  std::ranges::copy(trace_.experts(step_), routed_.begin());
  const int32_t layer = trace_.LayerOf(step_);
  const Plan& plan = PlanLayer(layer);
  decoder_.PostMisses(plan);
  if (predictor_) {
    predictor_->Learn(step_);
    Prefetch(plan);
  }
  decoder_.ComputeExperts(plan, ExpertNs(), [this](SlotId slot) {
    if (next_uses_) RankByNextUse(slot);
  });
  ++step_;
}

const Plan& Simulator::PlanLayer(int32_t layer) {
  const Plan& plan = decoder_.PlanLayer(layer, routed_, step_ + 1);
  if (next_uses_) {
    next_uses_->Pass(step_);
    for (const PlanRow& row : plan.rows) RankByNextUse(row.slot);
  }
  return plan;
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

LayerObservation Simulator::Observe() {
  const auto before = observed_;
  observed_ = {decoder_.stall_ns(), decoder_.late_stall_ns(), transfers_.moved_bytes()};
  const auto to_us = [](int64_t ns) { return static_cast<double>(ns) * 1e-3; };
  // Between two plans, as the caches measure it. Before the second there is nothing to measure.
  const int64_t compute_ns = decoder_.compute_ns();
  decoder_.ResetComputed();
  return {.compute_us = to_us(step_ > 0 ? compute_ns : config_.layer_time_ns),
          .stall_us = to_us(observed_.stall_ns - before.stall_ns),
          .late_stall_us = to_us(observed_.late_stall_ns - before.late_stall_ns),
          .moved_bytes = static_cast<double>(observed_.moved_bytes - before.moved_bytes),
          .bytes_per_second = transfers_.measured_bytes_per_second()};
}

void Simulator::Prefetch(const Plan& plan) {
  prefetcher_.RecordPlan(plan);
  const int32_t horizon = prefetcher_.BeginLayer(Observe());
  horizon_sum_ += prefetcher_.horizon();
  predictions_.clear();
  predictor_->Predict(step_, horizon, predictions_);
  PostPredicted();
}

void Simulator::PrefetchFirstLayers() {
  transfers_.AdvanceTo(decoder_.now_ns());
  const int64_t until_plan_ns = config_.layer_time_ns - ExpertNs();
  const int32_t horizon = prefetcher_.BeginToken(1, static_cast<double>(until_plan_ns) * 1e-3);
  predictions_.clear();
  predictor_->PredictToken(step_, horizon, predictions_);
  if (!predictions_.empty()) PostPredicted();  // else what waits would be taken back
}

void Simulator::PostPredicted() {
  prefetcher_.Prefetch(predictions_, [this](SlotId slot, Tick needed_at) {
    if (next_uses_) RankByNextUse(slot);
    transfers_.Post(slot, TransferClass::kPrefetch, needed_at, decoder_.now_ns());
  });
}

}  // namespace expertflow
