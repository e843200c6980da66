#include "core/prefetch_scheduler.h"

#include <algorithm>
#include <cmath>

namespace expertflow {
namespace {

// The balance of the last 20 to 80 tokens; waste shows late, when the expert is evicted, and the
// price moves slowly enough not to overshoot meanwhile: by a factor of e in 512 layers at most.
constexpr double kKeep = 1.0 - 1.0 / 1024;
constexpr double kPriceRate = 1.0 / 512;
constexpr double kBalanceWithoutEvidence = 8.0;  // transfers

}  // namespace

PrefetchScheduler::PrefetchScheduler(const PrefetchConfig& config)
    : expert_bytes_(static_cast<double>(config.expert_bytes)),
      horizon_(config.max_horizon, config.max_fetched, config.expert_bytes) {}

int32_t PrefetchScheduler::BeginLayer(const LayerObservation& layer) {
  horizon_.RecordLayer(layer.compute_us, layer.stall_us, layer.late_stall_us, layer.num_fetched);
  horizon_.Update(layer.bytes_per_second, layer.queued_bytes);
  missing_us_ = 0.0;
  if (layer.bytes_per_second <= 0.0) return 0;
  transfer_us_ = expert_bytes_ / layer.bytes_per_second * 1e6;
  Record(layer);
  UpdatePrice();
  return horizon();
}

int32_t PrefetchScheduler::BeginToken(double compute_us) {
  missing_us_ = horizon_.compute_us() - compute_us;
  return horizon();
}

void PrefetchScheduler::Record(const LayerObservation& layer) {
  const auto add = [](double& sum, double value) { sum = sum * kKeep + value; };
  add(balance_.gain, layer.num_prefetch_used - layer.late_stall_us / transfer_us_);
  add(balance_.wasted, layer.num_prefetch_wasted);
  add(balance_.regretted, layer.num_prefetch_regretted);
  add(balance_.fetched, layer.num_fetched);
  add(balance_.stall, layer.stall_us / transfer_us_);
  add(balance_.busy_us, layer.moved_bytes / expert_bytes_ * transfer_us_);
  add(balance_.elapsed_us, layer.compute_us + layer.stall_us);
}

void PrefetchScheduler::UpdatePrice() {
  const double rho = std::min(balance_.busy_us / std::max(balance_.elapsed_us, 1.0), 1.0);
  const double exposed = std::min(balance_.stall / std::max(balance_.fetched, 1.0), 1.0);
  const double cost = 2.0 * (balance_.wasted * rho * rho * rho + balance_.regretted * exposed) +
                      kMargin * balance_.stall;
  const double allowed = kCostShare * std::max(balance_.gain, 0.0);
  const double imbalance = (cost - allowed) / (cost + allowed + kBalanceWithoutEvidence);
  price_ = std::clamp(price_ * std::exp(kPriceRate * imbalance), kMinPrice, kMaxPrice);
  least_need_ = price_ / (1.0 + price_);
}

bool PrefetchScheduler::Admits(const Prediction& prediction, size_t num_bytes,
                               size_t bytes_ahead) const {
  const double transfer_us = TransferUs(num_bytes);
  const double idle_us = ComputeUntil(prediction.distance) - TransferUs(bytes_ahead);
  const double hidden_us = std::min(idle_us, transfer_us);
  const auto need = static_cast<double>(prediction.need);
  return hidden_us > 0.0 && need * hidden_us >= (1.0 - need) * price_ * transfer_us;
}

bool PrefetchScheduler::HasTimeFor(size_t num_bytes, int32_t distance) const {
  return TransferUs(num_bytes) <= ComputeUntil(distance);
}

}  // namespace expertflow
