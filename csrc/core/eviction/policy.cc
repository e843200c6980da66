#include "core/eviction/policy.h"

#include <stdexcept>

namespace expertflow {

PolicyKind ParsePolicy(std::string_view name) {
  if (name == "lru") return PolicyKind::kLru;
  if (name == "decayed_frequency") return PolicyKind::kDecayedFrequency;
  if (name == "two_level_lru") return PolicyKind::kTwoLevelLru;
  if (name == "on_demand") return PolicyKind::kOnDemand;
  if (name == "predicted_need") return PolicyKind::kPredictedNeed;
  throw std::invalid_argument(
      "policy '" + std::string(name) +
      "' is unknown: use lru, decayed_frequency, two_level_lru, predicted_need or on_demand");
}

CacheScope ParseScope(std::string_view name) {
  if (name == "global") return CacheScope::kGlobal;
  if (name == "layer") return CacheScope::kLayer;
  throw std::invalid_argument("cache scope '" + std::string(name) +
                              "' is unknown: use global or layer");
}

}  // namespace expertflow
