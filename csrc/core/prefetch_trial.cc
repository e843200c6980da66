#include "core/prefetch_trial.h"

#include <algorithm>

namespace expertflow {
namespace {

// A token has 12 to 60 layers.
constexpr int32_t kFewestBlockLayers = 4;
constexpr double kErrorsToBegin = 3.0;
constexpr double kErrorsToGoOn = 1.0;
constexpr int32_t kLayersOfTrial = 4096;  // while prefetching is off
constexpr int32_t kLayersOfCheck = 1024;  // while it is on
constexpr int64_t kLongestRestWhileOn = 8192;
constexpr int64_t kLongestRestWhileOff = 65536;
constexpr double kFitRate = 0.5;

}  // namespace

bool PrefetchTrial::Block::is_complete() const {
  const bool has_stalled = plain_us > 0.0 || prefetching_us > 0.0 || measured_us > 0.0;
  return num_layers >= kFewestBlockLayers && has_stalled;
}

PrefetchTrial::PrefetchTrial(const SlotTableView& table, const Planner& planner,
                             const TransferQueue& queue, const PlannerConfig& config)
    : plain_(table, planner, queue, config, /*prefetches=*/false),
      prefetching_(table, planner, queue, config, /*prefetches=*/true) {}

void PrefetchTrial::BeginLayer(int32_t layer, Tick tick, std::span<const int64_t> experts,
                               const LayerObservation& measured) {
  if (measured.bytes_per_second <= 0.0) return Interrupt();
  if (rest_.Advance(measured.bytes_per_second, measured.compute_us)) evidence_ = {};
  if (rest_.is_on()) return;
  if (!is_following_) Follow();
  block_.plain_us += plain_.BeginLayer(layer, tick, experts, measured);
  block_.prefetching_us += prefetching_.BeginLayer(layer, tick, experts, measured);
  block_.measured_us += measured.stall_us;
  block_.compute_us += measured.compute_us;
  ++block_.num_layers;
  ++num_layers_;
  if (block_.is_complete()) EndBlock();
  RestIfClear();
}

int32_t PrefetchTrial::BeginToken(double compute_us) {
  if (!is_following_) return 0;
  plain_.BeginToken(compute_us);
  prefetching_.BeginToken(compute_us);
  return horizon();
}

void PrefetchTrial::Follow() {
  plain_.Restart();
  prefetching_.Restart();
  is_following_ = true;
  block_ = {};
}

void PrefetchTrial::EndBlock() {
  if (!pays_) FitExpertsShare();
  evidence_.Record(block_.plain_us - block_.prefetching_us);
  block_ = {};
  if (!evidence_.has_enough()) return;
  if (evidence_.IsAbove(pays_ ? kErrorsToGoOn : kErrorsToBegin) != pays_) SetPays(!pays_);
}

void PrefetchTrial::FitExpertsShare() {
  const double shadow_us = block_.plain_us;
  // Stalls that are short beside what is computed say as much as long ones.
  const double scale_us = 4.0 * std::max(shadow_us, block_.measured_us);
  const double error =
      (shadow_us - block_.measured_us) / std::max(std::min(block_.compute_us, scale_us), 1.0);
  experts_share_ = std::clamp(experts_share_ + kFitRate * error, 0.0, 1.0);
  plain_.set_experts_share(experts_share_);
  prefetching_.set_experts_share(experts_share_);
}

void PrefetchTrial::SetPays(bool pays) {
  pays_ = pays;
  num_layers_ = 0;
  if (!pays) evidence_ = {};
  rest_.Shorten();
}

void PrefetchTrial::RestIfClear() {
  if (num_layers_ < (pays_ ? kLayersOfCheck : kLayersOfTrial)) return;
  const bool is_clear =
      pays_ ? evidence_.IsAbove(kErrorsToBegin) : !evidence_.IsAbove(kErrorsToGoOn);
  if (!is_clear) return;
  is_following_ = false;
  num_layers_ = 0;
  rest_.Begin(pays_ ? kLongestRestWhileOn : kLongestRestWhileOff);
}

void PrefetchTrial::Prefetch(std::span<const Prediction> predictions) {
  if (is_following_) prefetching_.Prefetch(predictions);
}

void PrefetchTrial::PrefetchNeeded(std::span<const float> need) {
  if (is_following_) prefetching_.PrefetchNeeded(need);
}

}  // namespace expertflow
