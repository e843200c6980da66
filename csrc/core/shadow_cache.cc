#include "core/shadow_cache.h"

#include <cmath>

namespace expertflow {

ShadowCache::ShadowCache(const SlotTableView& table, const Planner& planner,
                         const TransferQueue& queue, const PlannerConfig& config, bool prefetches)
    : real_(table),
      prefetches_(prefetches),
      table_(table.num_layers, table.num_experts, table.num_slots),
      planner_(table_, config, &planner),
      transfers_(table_, planner_, config.expert_bytes, queue.chunk_bytes(),
                 queue.demand_chunk_bytes(), {.bytes_per_second = 1.0, .latency_ns = 0}),
      decoder_(planner_, transfers_, /*costs=*/{}),
      prefetcher_(table_.view(), planner_, transfers_.queue(), config, Prefetcher::kUntried),
      post_prefetch_([this](SlotId slot, Tick needed_at) {
        transfers_.Post(slot, TransferClass::kPrefetch, needed_at, decoder_.now_ns());
      }) {
  predictions_.reserve(static_cast<size_t>(Prefetcher::kMaxHorizon) *
                       static_cast<size_t>(table.num_experts));
}

void ShadowCache::Restart() {
  transfers_.CancelAll(decoder_.now_ns());
  table_.CopyAtRest(real_);
  prefetcher_.Restart();
  plan_ = nullptr;
  until_plan_us_.reset();
  decoder_.ResetStalls();
  moved_bytes_ = transfers_.moved_bytes();
}

double ShadowCache::BeginLayer(int32_t layer, Tick tick, std::span<const int64_t> experts,
                               const LayerObservation& measured) {
  transfers_.set_link({.bytes_per_second = measured.bytes_per_second, .latency_ns = 0});
  compute_us_ = measured.compute_us;
  if (plan_ != nullptr) ComputeUntilPlan();
  const double stall_us = static_cast<double>(decoder_.stall_ns()) * 1e-3;
  LayerObservation observed = measured;
  observed.stall_us = stall_us;
  observed.late_stall_us = static_cast<double>(decoder_.late_stall_ns()) * 1e-3;
  observed.moved_bytes = static_cast<double>(transfers_.moved_bytes() - moved_bytes_);
  moved_bytes_ = transfers_.moved_bytes();
  decoder_.ResetStalls();
  plan_ = &decoder_.PlanLayer(layer, experts, tick);
  decoder_.PostMisses(*plan_);
  if (prefetches_) {
    prefetcher_.RecordPlan(*plan_);
    prefetcher_.BeginLayer(observed);
  }
  return stall_us;
}

void ShadowCache::BeginToken(double compute_us) {
  ComputeExperts();
  until_plan_us_ = compute_us;
  transfers_.AdvanceTo(decoder_.now_ns());
  if (prefetches_) prefetcher_.BeginToken(/*num_tokens=*/1, compute_us);
}

void ShadowCache::ComputeUntilPlan() {
  if (!until_plan_us_) {
    ComputeExperts();
    until_plan_us_ = compute_us_ * (1.0 - experts_share_);
  }
  decoder_.Compute(std::llround(*until_plan_us_ * 1e3));
  until_plan_us_.reset();
  transfers_.AdvanceTo(decoder_.now_ns());
}

void ShadowCache::ComputeExperts() {
  decoder_.ComputeExperts(*plan_, std::llround(compute_us_ * experts_share_ * 1e3), [](SlotId) {});
}

void ShadowCache::Prefetch(std::span<const Prediction> predictions) {
  predictions_.assign(predictions.begin(), predictions.end());
  prefetcher_.Prefetch(predictions_, post_prefetch_);
}

void ShadowCache::PrefetchNeeded(std::span<const float> need) {
  prefetcher_.PrefetchNeeded(need, post_prefetch_);
}

}  // namespace expertflow
