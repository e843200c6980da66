#include "core/horizon_controller.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace expertflow {
namespace {

// Weights of one layer in the averages. A token has 12 to 60 layers: the first follows a change
// within a few tokens, the second within some 20.
constexpr double kFastRate = 1.0 / 64;
constexpr double kSlowRate = 1.0 / 512;
constexpr double kBurstPercentile = 0.95;
constexpr double kHysteresisLayers = 0.25;
// A transfer as a multiple of what the longest horizon hides: above the first, prefetch is turned
// off, below the second on again.
constexpr double kTooSlow = 1.6;
constexpr double kFastEnough = 1.4;
constexpr int32_t kLayersBetweenBoosts = 1024;
constexpr double kLateThatRaises = 5e-4;  // of the compute time
constexpr double kLateThatLowers = 1e-4;
constexpr double kStallThatKeeps = 0.9;      // of the stall before
constexpr double kLateThatTriesAgain = 1.5;  // of the lateness when one more did not help

}  // namespace

HorizonController::HorizonController(int32_t max_horizon, int32_t top_k, size_t expert_bytes)
    : max_horizon_(max_horizon), expert_bytes_(static_cast<double>(expert_bytes)) {
  if (max_horizon < 0 || top_k <= 0 || expert_bytes == 0) {
    throw std::invalid_argument("a horizon controller needs experts and no negative horizon");
  }
  fetched_.assign(static_cast<size_t>(top_k) + 1, 0.0);
}

void HorizonController::RecordLayer(double compute_us, double stall_us, double late_stall_us,
                                    int32_t num_fetched) {
  compute_us_ += (compute_us - compute_us_) * (compute_us_ > 0.0 ? kFastRate : 1.0);
  stall_us_ += (stall_us - stall_us_) * kSlowRate;
  late_stall_us_ += (late_stall_us - late_stall_us_) * kSlowRate;
  for (double& count : fetched_) count *= 1.0 - kSlowRate;
  fetched_[std::min(static_cast<size_t>(num_fetched), fetched_.size() - 1)] += 1.0;
  num_layers_ = num_layers_ * (1.0 - kSlowRate) + 1.0;
}

int32_t HorizonController::burst() const {
  size_t burst = 0;
  double num_within = fetched_[0];
  while (burst + 1 < fetched_.size() && num_within < kBurstPercentile * num_layers_) {
    num_within += fetched_[++burst];
  }
  return std::max(static_cast<int32_t>(burst), 1);
}

int32_t HorizonController::Update(double bytes_per_second, double queued_bytes) {
  queued_bytes_ += (queued_bytes - queued_bytes_) * kFastRate;
  if (bytes_per_second <= 0.0 || compute_us_ <= 0.0) return horizon_ = 0;
  const double lead_us = (queued_bytes_ + burst() * expert_bytes_) / bytes_per_second * 1e6;
  const double reach_us = max_horizon_ * compute_us_;
  const double transfer_us = expert_bytes_ / bytes_per_second * 1e6;
  is_too_slow_ = transfer_us > (is_too_slow_ ? kFastEnough : kTooSlow) * reach_us;
  if (is_too_slow_) return horizon_ = 0;
  const double layers = std::min(lead_us / compute_us_, static_cast<double>(max_horizon_));
  const bool is_first = lead_layers_ == 0;  // any lead is a layer, however fast the link
  if (is_first || layers > lead_layers_ + kHysteresisLayers ||
      layers < lead_layers_ - 1 - kHysteresisLayers) {
    lead_layers_ = static_cast<int32_t>(std::ceil(layers));
  }
  UpdateBoost();
  return horizon_ = std::min(lead_layers_ + boost_, max_horizon_);
}

void HorizonController::UpdateBoost() {
  if (++layers_since_boost_ < kLayersBetweenBoosts) return;
  if (is_trial_) {
    EndTrial();
  } else if (late_stall_us_ > kLateThatRaises * compute_us_) {
    TryOneMore();
  } else if (late_stall_us_ < kLateThatLowers * compute_us_ && boost_ > 0) {
    --boost_;
    layers_since_boost_ = 0;
  }
}

void HorizonController::TryOneMore() {
  if (horizon_ >= max_horizon_ || late_stall_us_ < kLateThatTriesAgain * late_when_refused_us_) {
    return;
  }
  ++boost_;
  is_trial_ = true;
  stall_before_trial_us_ = stall_us_;
  layers_since_boost_ = 0;
}

void HorizonController::EndTrial() {
  is_trial_ = false;
  layers_since_boost_ = 0;
  late_when_refused_us_ = 0.0;
  if (stall_us_ <= kStallThatKeeps * stall_before_trial_us_) return;
  --boost_;
  late_when_refused_us_ = late_stall_us_;
}

}  // namespace expertflow
