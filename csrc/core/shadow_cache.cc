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
      prefetcher_(table_.view(), planner_, transfers_.queue(), config, Prefetcher::kUntried),
      post_prefetch_([this](SlotId slot, Tick needed_at) {
        Post(slot, TransferClass::kPrefetch, needed_at);
      }) {
  predictions_.reserve(static_cast<size_t>(Prefetcher::kMaxHorizon) *
                       static_cast<size_t>(table.num_experts));
}

void ShadowCache::Restart() {
  transfers_.CancelAll(now_ns_);
  table_.CopyAtRest(real_);
  prefetcher_.Restart();
  plan_ = nullptr;
  until_plan_us_.reset();
  stall_ns_ = late_stall_ns_ = 0;
  moved_bytes_ = transfers_.moved_bytes();
}

double ShadowCache::BeginLayer(int32_t layer, Tick tick, std::span<const int64_t> experts,
                               const LayerObservation& measured) {
  transfers_.set_link({.bytes_per_second = measured.bytes_per_second, .latency_ns = 0});
  compute_us_ = measured.compute_us;
  if (plan_ != nullptr) ComputeUntilPlan();
  const double stall_us = static_cast<double>(stall_ns_) * 1e-3;
  LayerObservation observed = measured;
  observed.stall_us = stall_us;
  observed.late_stall_us = static_cast<double>(late_stall_ns_) * 1e-3;
  observed.moved_bytes = static_cast<double>(transfers_.moved_bytes() - moved_bytes_);
  moved_bytes_ = transfers_.moved_bytes();
  stall_ns_ = late_stall_ns_ = 0;
  PlanLayer(layer, tick, experts);
  if (prefetches_) {
    prefetcher_.RecordPlan(*plan_);
    prefetcher_.BeginLayer(observed);
  }
  return stall_us;
}

void ShadowCache::BeginToken(double compute_us) {
  ComputeExperts();
  until_plan_us_ = compute_us;
  transfers_.AdvanceTo(now_ns_);
  if (prefetches_) prefetcher_.BeginToken(/*num_tokens=*/1, compute_us);
}

void ShadowCache::ComputeUntilPlan() {
  if (!until_plan_us_) {
    ComputeExperts();
    until_plan_us_ = compute_us_ * (1.0 - experts_share_);
  }
  now_ns_ += std::llround(*until_plan_us_ * 1e3);
  until_plan_us_.reset();
  transfers_.AdvanceTo(now_ns_);
}

void ShadowCache::ComputeExperts() {
  const int64_t experts_ns = std::llround(compute_us_ * experts_share_ * 1e3);
  const auto num_rows = static_cast<int64_t>(plan_->rows.size());
  for (int64_t r = 0; r < num_rows; ++r) {
    const PlanRow row = plan_->rows[static_cast<size_t>(r)];
    const int64_t ready_ns = transfers_.WaitUntilReady(row.slot, now_ns_);
    stall_ns_ += ready_ns - now_ns_;
    if (row.state == RowState::kLoading) late_stall_ns_ += ready_ns - now_ns_;
    now_ns_ = ready_ns + experts_ns * (r + 1) / num_rows - experts_ns * r / num_rows;
    const int32_t next = planner_.Advance(static_cast<int32_t>(r));
    if (next == kNoRow) continue;
    Post(plan_->rows[static_cast<size_t>(next)].slot, TransferClass::kDemand, plan_->tick);
  }
}

void ShadowCache::PlanLayer(int32_t layer, Tick tick, std::span<const int64_t> experts) {
  plan_ = planner_.PlanLayer(layer, experts, /*num_tokens=*/1, tick);
  if (plan_ == nullptr) {  // transfers hold every slot
    const int64_t free_ns = transfers_.CancelAll(now_ns_);
    stall_ns_ += free_ns - now_ns_;
    now_ns_ = free_ns;
    plan_ = planner_.PlanLayer(layer, experts, /*num_tokens=*/1, tick);
  }
  for (const PlanRow& row : plan_->rows) {
    if (row.state == RowState::kLoading) transfers_.Promote(row.slot, plan_->tick);
    if (row.state == RowState::kMiss && row.wave == 0) {
      Post(row.slot, TransferClass::kDemand, plan_->tick);
    }
  }
}

void ShadowCache::Post(SlotId slot, TransferClass transfer_class, Tick needed_at) {
  transfers_.Post(slot, transfer_class, needed_at, now_ns_);
}

void ShadowCache::Prefetch(std::span<const Prediction> predictions) {
  predictions_.assign(predictions.begin(), predictions.end());
  prefetcher_.Prefetch(predictions_, post_prefetch_);
}

void ShadowCache::PrefetchNeeded(std::span<const float> need) {
  prefetcher_.PrefetchNeeded(need, post_prefetch_);
}

}  // namespace expertflow
