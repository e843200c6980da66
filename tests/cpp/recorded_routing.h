// The planners of paired_planners.h on recorded routing, which no repository holds: the variable
// EXPERTFLOW_TRACE names an array of expert ids, see bench/cpp/npy_trace.h.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "npy_trace.h"
#include "paired_planners.h"

namespace expertflow {

// The first tokens, with a cache of a quarter and of half of the experts.
template <class BlockPlanner>
void ExpectEqualOnRecordedRouting(PolicyKind policy, CacheScope scope, int64_t num_tokens) {
  const char* path = std::getenv("EXPERTFLOW_TRACE");
  if (path == nullptr) GTEST_SKIP() << "EXPERTFLOW_TRACE names no recorded routing";
  const Trace trace = ReadTrace(path);
  const auto num_experts = static_cast<int32_t>(std::ranges::max(trace.ids) + 1);
  for (const int32_t share : {4, 2}) {
    const Shape shape{trace.num_layers, num_experts, trace.top_k,
                      trace.num_layers * (num_experts / share)};
    PairedPlanners<BlockPlanner>(shape, policy, scope)
        .RunRecorded(trace.ids, std::min(num_tokens, trace.num_tokens));
  }
}

}  // namespace expertflow
