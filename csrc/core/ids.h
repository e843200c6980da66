#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/host_device.h"

namespace expertflow {

// One expert, by its MoE layer (dense layers are not counted) and its number within the layer.
struct ExpertId {
  int32_t layer;
  int32_t expert;
  friend bool operator==(const ExpertId&, const ExpertId&) = default;
};

// `ExpertId` as one number, layer * num_experts + expert: the index of all per-expert arrays.
enum class ExpertIndex : int32_t { kNone = -1 };

// A place in the cache that holds one expert.
enum class SlotId : int32_t { kNone = -1 };

// Counts planned layers: every plan gets the next tick. It is the clock of all eviction policies.
using Tick = int64_t;

template <class Id>
EXPERTFLOW_HD constexpr int32_t Index(Id id) {
  return static_cast<int32_t>(id);
}

// A number from outside, such as an expert id. What does not fit stays out of range instead of
// becoming the id of another expert.
constexpr int32_t Saturated(int64_t value) {
  using Limits = std::numeric_limits<int32_t>;
  return static_cast<int32_t>(std::clamp<int64_t>(value, Limits::min(), Limits::max()));
}

}  // namespace expertflow
