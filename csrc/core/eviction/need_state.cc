#include "core/eviction/need_state.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace expertflow {
namespace {

int32_t WindowOf(int32_t num_layers, int32_t num_experts, int32_t top_k, int32_t num_slots) {
  const int64_t slots_per_layer = std::min(num_slots / num_layers, num_experts);
  const int64_t rounded = (6 * slots_per_layer + top_k) / (2 * int64_t{top_k});
  return static_cast<int32_t>(std::clamp<int64_t>(rounded, 2, NeedRules::kMaxWindow));
}

int32_t RoundUp(int32_t value, int32_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

NeedArrays::NeedArrays(int32_t num_layers, int32_t num_experts, int32_t top_k, int32_t num_slots)
    : state_{} {
  const int32_t window = WindowOf(num_layers, num_experts, top_k, num_slots);
  const auto ring = static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(window) + 2));
  const int32_t row = RoundUp(num_experts, NeedRules::kVectorWidth);
  const auto layers = static_cast<size_t>(num_layers);
  const auto experts = static_cast<size_t>(num_experts);
  const auto width = static_cast<size_t>(row);
  const size_t rings = layers * static_cast<size_t>(ring);
  weights_.resize(layers * NeedRules::kNumSources * experts * width);
  frequency_.resize(layers * width);
  num_steps_.resize(layers);
  steps_.resize(rings);
  routed_.resize(rings * experts);
  foreseen_.resize(rings * width);
  scores_.resize(layers * experts);
  for (int32_t i = 0; i < std::ssize(sigmoid_); ++i) {
    const double logit = std::ldexp(i - NeedRules::kSigmoidHalf + 0.5,
                                    NeedRules::kLogitStepBits - NeedRules::kFractionBits);
    sigmoid_[static_cast<size_t>(i)] =
        static_cast<int16_t>(std::lround(NeedRules::kOneQ15 / (1.0 + std::exp(-logit))));
  }
  state_ = {num_layers,
            num_experts,
            row,
            top_k,
            window,
            ring,
            weights_.data(),
            frequency_.data(),
            num_steps_.data(),
            steps_.data(),
            routed_.data(),
            foreseen_.data(),
            scores_.data(),
            sigmoid_.data()};
}

}  // namespace expertflow
