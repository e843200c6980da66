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
constexpr double kPriceAfterPause = 2.0;
constexpr int64_t kFirstPauseLayers = 1024;
constexpr int64_t kLongestPauseLayers = 32 * kFirstPauseLayers;

}  // namespace

PrefetchScheduler::PrefetchScheduler(const PrefetchConfig& config)
    : expert_bytes_(static_cast<double>(config.expert_bytes)),
      horizon_(config.max_horizon, config.top_k, config.expert_bytes),
      next_pause_layers_(kFirstPauseLayers) {}

int32_t PrefetchScheduler::BeginLayer(const LayerObservation& layer) {
  horizon_.RecordLayer(layer.compute_us, layer.stall_us, layer.num_fetched);
  horizon_.Update(layer.bytes_per_second, layer.queued_bytes);
  if (layer.bytes_per_second <= 0.0) return 0;
  transfer_us_ = expert_bytes_ / layer.bytes_per_second * 1e6;
  if (is_paused()) {
    --layers_paused_;
  } else {
    UpdatePrice(layer);
    PauseIfTooDear();
  }
  return horizon();
}

void PrefetchScheduler::UpdatePrice(const LayerObservation& layer) {
  const double saved_us = layer.num_prefetch_used * transfer_us_ - layer.late_stall_us;
  hidden_us_ = hidden_us_ * kKeep + saved_us;
  wasted_us_ = wasted_us_ * kKeep + layer.wasted_bytes / expert_bytes_ * transfer_us_;
  const double allowed_us = kWasteShare * std::max(hidden_us_, 0.0);
  const double imbalance = (wasted_us_ - allowed_us) /
                           (wasted_us_ + allowed_us + kBalanceWithoutEvidence * transfer_us_);
  price_ = std::clamp(price_ * std::exp(kPriceRate * imbalance), kMinPrice, kMaxPrice);
}

void PrefetchScheduler::PauseIfTooDear() {
  if (price_ < 1.0) next_pause_layers_ = kFirstPauseLayers;
  if (price_ < kMaxPrice) return;
  layers_paused_ = next_pause_layers_;
  next_pause_layers_ = std::min(2 * next_pause_layers_, kLongestPauseLayers);
  price_ = kPriceAfterPause;
  hidden_us_ = wasted_us_ = 0.0;
}

bool PrefetchScheduler::Admits(const Prediction& prediction, double bytes_ahead) const {
  const double ahead_us = bytes_ahead / expert_bytes_ * transfer_us_;
  const double idle_us = prediction.distance * horizon_.compute_us() - ahead_us;
  const double hidden_us = std::min(idle_us, transfer_us_);
  const auto need = static_cast<double>(prediction.need);
  return hidden_us > 0.0 && need * hidden_us >= (1.0 - need) * price_ * transfer_us_;
}

}  // namespace expertflow
