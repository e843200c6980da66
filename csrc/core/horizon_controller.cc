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
constexpr double kStallThatRaises = 5e-4;  // of the compute time
constexpr double kLateThatLowers = 1e-4;
constexpr double kStallThatTriesAgain = 1.5;  // of the stall when one more did not help
// A duel is won when the mean of the pairs is that many standard errors above 0, or, after
// kMaxPairs, fewer of them. It is lost sooner: it costs what it loses, and what is refused by
// chance may be tried again. What the other block has left in the cache and on the link is gone
// after the first layers of a block.
constexpr int32_t kBlockLayers = 128;
constexpr int32_t kIgnoredLayers = 32;
constexpr int32_t kMinPairs = 8;
constexpr int32_t kMaxPairs = 64;
constexpr double kErrorsThatWin = 3.5;
constexpr double kErrorsThatWinAtLast = 2.0;
constexpr double kErrorsThatLose = 1.5;

}  // namespace

HorizonController::HorizonController(int32_t max_horizon, int32_t max_fetched, size_t expert_bytes)
    : max_horizon_(max_horizon), expert_bytes_(static_cast<double>(expert_bytes)) {
  if (max_horizon < 0 || max_fetched <= 0 || expert_bytes == 0) {
    throw std::invalid_argument("a horizon controller needs experts and no negative horizon");
  }
  fetched_.assign(static_cast<size_t>(max_fetched) + 1, 0.0);
}

void HorizonController::RecordLayer(double compute_us, double stall_us, double late_stall_us,
                                    int32_t num_fetched) {
  compute_us_ += (compute_us - compute_us_) * (compute_us_ > 0.0 ? kFastRate : 1.0);
  last_stall_us_ = stall_us;
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
  const int32_t tried = duel_.layers >= kBlockLayers ? duel_.step : 0;
  return horizon_ = std::clamp(lead_layers_ + boost_ + tried, 1, max_horizon_);
}

void HorizonController::UpdateBoost() {
  if (duel_.step != 0) return AdvanceDuel();
  if (++layers_since_boost_ < kLayersBetweenBoosts) return;
  if (late_stall_us_ < kLateThatLowers * compute_us_ && boost_ > 0) {
    --boost_;
    layers_since_boost_ = 0;
  } else if (stall_us_ > kStallThatRaises * compute_us_) {
    for (const int32_t step : {next_step_, -next_step_}) {
      if (duel_.step == 0 && MayTry(step)) duel_ = {.step = step, .stall_before_us = stall_us_};
    }
  }
}

bool HorizonController::MayTry(int32_t step) const {
  const bool is_possible = step > 0 ? horizon_ < max_horizon_ : horizon_ > 1;
  return is_possible && stall_us_ > kStallThatTriesAgain * stall_when_refused_us_[step > 0];
}

// The stall was that of a layer of the block that was running.
void HorizonController::AdvanceDuel() {
  const bool is_with = duel_.layers >= kBlockLayers;
  if (duel_.layers % kBlockLayers >= kIgnoredLayers) {
    duel_.saved_us += is_with ? -last_stall_us_ : last_stall_us_;
  }
  if (++duel_.layers < 2 * kBlockLayers) return;
  duel_.layers = 0;
  ++duel_.pairs;
  duel_.sum_us += duel_.saved_us;
  duel_.sum_squares += duel_.saved_us * duel_.saved_us;
  duel_.saved_us = 0.0;
  if (duel_.pairs < kMinPairs) return;
  const double variance = duel_.sum_squares - duel_.sum_us * duel_.sum_us / duel_.pairs;
  const double error_us = std::sqrt(std::max(variance, 0.0));  // of the sum
  const bool is_last = duel_.pairs == kMaxPairs;
  const double errors_to_win = is_last ? kErrorsThatWinAtLast : kErrorsThatWin;
  if (duel_.sum_us > errors_to_win * error_us) {
    EndDuel(/*is_won=*/true);
  } else if (is_last || duel_.sum_us <= -kErrorsThatLose * error_us) {
    EndDuel(/*is_won=*/false);
  }
}

// The way back from a step that was won is one that was refused.
void HorizonController::EndDuel(bool is_won) {
  const int32_t step = duel_.step;
  const double stall_us = std::max(duel_.stall_before_us, stall_us_);
  duel_ = {};
  layers_since_boost_ = 0;
  if (is_won) boost_ += step;
  next_step_ = is_won ? step : -step;
  stall_when_refused_us_[next_step_ < 0] = stall_us;
  if (is_won) stall_when_refused_us_[step > 0] = 0.0;
}

}  // namespace expertflow
