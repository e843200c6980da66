#include "core/eviction/policy.h"

#include <stdexcept>

namespace expertflow {
namespace {

struct NamedPolicy {
  const char* name;
  PolicyKind kind;
};

constexpr NamedPolicy kPolicies[] = {
    {"decayed_frequency", PolicyKind::kDecayedFrequency},
    {"predicted_need", PolicyKind::kPredictedNeed},
    {"lru", PolicyKind::kLru},
    {"two_level_lru", PolicyKind::kTwoLevelLru},
    {"on_demand", PolicyKind::kOnDemand},
};

}  // namespace

std::vector<std::string> PolicyNames() {
  std::vector<std::string> names;
  for (const NamedPolicy& policy : kPolicies) names.emplace_back(policy.name);
  return names;
}

PolicyKind ParsePolicy(std::string_view name) {
  std::string known;
  for (const NamedPolicy& policy : kPolicies) {
    if (name == policy.name) return policy.kind;
    known += (known.empty() ? "" : ", ") + std::string(policy.name);
  }
  throw std::invalid_argument("policy '" + std::string(name) + "' is unknown: use one of " + known);
}

CacheScope ParseScope(std::string_view name) {
  if (name == "global") return CacheScope::kGlobal;
  if (name == "layer") return CacheScope::kLayer;
  throw std::invalid_argument("cache scope '" + std::string(name) +
                              "' is unknown: use global or layer");
}

}  // namespace expertflow
