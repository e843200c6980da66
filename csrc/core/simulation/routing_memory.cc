#include "core/simulation/routing_memory.h"

#include <algorithm>
#include <cmath>
#include <ranges>

namespace expertflow {
namespace {

constexpr int64_t kMaxLag = 8192;
constexpr size_t kNumNearest = 64;
constexpr float kMemory = 0.9F;
constexpr float kPriorWeight = 0.2F;

}  // namespace

RoutingMemory::RoutingMemory(const TraceView& trace) : trace_(trace) {
  tokens_of_.resize(static_cast<size_t>(trace.num_layers) * static_cast<size_t>(trace.num_experts));
}

void RoutingMemory::Observe(int64_t step) {
  step_ = step;
  const int64_t num_lags = std::min(trace_.TokenOf(step), kMaxLag);
  similarities_.resize(static_cast<size_t>(num_lags), 0.0F);
  for (float& similarity : similarities_) similarity *= kMemory;
  AddOverlap(step);
  FindNearest();
}

void RoutingMemory::AddOverlap(int64_t step) {
  const auto token = static_cast<int32_t>(trace_.TokenOf(step));
  const auto num_lags = static_cast<int32_t>(similarities_.size());
  for (const uint16_t expert : trace_.experts(step)) {
    std::vector<int32_t>& tokens =
        tokens_of_[static_cast<size_t>(Index(trace_.IndexOf(step, expert)))];
    for (const int32_t past : std::views::reverse(tokens)) {
      if (token - past > num_lags) break;
      similarities_[static_cast<size_t>(token - past - 1)] += 1.0F;
    }
    tokens.push_back(token);
  }
}

void RoutingMemory::FindNearest() {
  // What was nearest at the last step is no farther than its decayed similarity, so the new ones
  // are not below the last of these.
  const float limit = nearest_.size() < kNumNearest ? 0.0F : nearest_.back().similarity * kMemory;
  nearest_.clear();
  for (size_t i = 0; i < similarities_.size(); ++i) {
    if (similarities_[i] < limit) continue;
    nearest_.push_back({similarities_[i], static_cast<int32_t>(i) + 1});
  }
  const auto end = nearest_.begin() + std::ssize(nearest_ | std::views::take(kNumNearest));
  std::partial_sort(nearest_.begin(), end, nearest_.end(), [](const Past& a, const Past& b) {
    return a.similarity != b.similarity ? a.similarity > b.similarity : a.lag < b.lag;
  });
  nearest_.erase(end, nearest_.end());
}

void RoutingMemory::Vote(int32_t distance, float sharpness, std::span<const float> prior,
                         std::span<float> shares) const {
  for (size_t e = 0; e < shares.size(); ++e) shares[e] = kPriorWeight * prior[e];
  float total = kPriorWeight;
  const float scale = sharpness / static_cast<float>(trace_.top_k);
  for (const Past& past : nearest_) {
    const int64_t voted = step_ + distance - int64_t{past.lag} * trace_.num_layers;
    if (voted > step_) continue;  // it is not known either
    const float weight = std::exp(scale * (past.similarity - nearest_.front().similarity));
    total += weight;
    for (const uint16_t expert : trace_.experts(voted)) shares[expert] += weight;
  }
  for (float& share : shares) share /= total;
}

}  // namespace expertflow
