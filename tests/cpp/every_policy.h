#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <string>
#include <tuple>

#include "core/eviction/policy.h"

namespace expertflow {

// The parameters of tests that run with every policy in every scope:
//   INSTANTIATE_TEST_SUITE_P(AllPolicies, SomeTest, EveryPolicyAndScope(), NameOfPolicyAndScope);
using PolicyAndScope = std::tuple<PolicyKind, CacheScope>;

inline auto EveryPolicyAndScope() {
  return testing::Combine(
      testing::Values(PolicyKind::kLru, PolicyKind::kDecayedFrequency, PolicyKind::kTwoLevelLru,
                      PolicyKind::kOnDemand, PolicyKind::kPredictedNeed),
      testing::Values(CacheScope::kGlobal, CacheScope::kLayer));
}

inline std::string NameOfPolicyAndScope(const testing::TestParamInfo<PolicyAndScope>& info) {
  const std::array policies = {"Lru", "DecayedFrequency", "TwoLevelLru", "OnDemand",
                               "PredictedNeed"};
  const auto [policy, scope] = info.param;
  return std::string(policies[static_cast<size_t>(policy)]) +
         (scope == CacheScope::kGlobal ? "Global" : "PerLayer");
}

}  // namespace expertflow
