// Hit rates of the policies on a recorded routing trace, and what a plan costs there: one token
// after the other, layer by layer, with caches of 12.5 to 75 % of the experts, one table for all
// layers or a share for each.
//
//   EXPERTFLOW_TRACE=ids.npy [EXPERTFLOW_TRACE_EXPERTS=64] [EXPERTFLOW_TRACE_TOKENS=12000]
//
// `ids.npy` has expert ids [tokens, layers, top_k]; a layer has EXPERTFLOW_TRACE_EXPERTS experts
// (if not given, the largest id and one). Without a trace there is nothing to measure.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <span>
#include <string>

#include "core/planner.h"
#include "npy_trace.h"

namespace expertflow {
namespace {

int64_t NumberFromEnvironment(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::stoll(value);
}

// Plans the whole trace with a cold cache; a missing expert is there for the next plan.
LayerStatistics Replay(const Trace& trace, int32_t num_experts, int32_t num_slots,
                       PolicyKind policy, CacheScope scope) {
  SlotTable table(trace.num_layers, num_experts, num_slots);
  Planner planner(table,
                  {.top_k = trace.top_k, .expert_bytes = 1, .policy = policy, .scope = scope});
  const auto top_k = static_cast<size_t>(trace.top_k);
  Tick now = 0;
  for (auto ids = std::span(trace.ids); !ids.empty(); ids = ids.subspan(top_k)) {
    const auto layer = static_cast<int32_t>(now % trace.num_layers);
    const Plan* plan = planner.PlanLayer(layer, ids.first(top_k), 1, ++now);
    for (const PlanRow& row : plan->rows) {
      if (row.state == RowState::kMiss) planner.Publish(row.slot);
    }
  }
  LayerStatistics total;
  for (const LayerStatistics& layer : planner.statistics()) total += layer;
  return total;
}

void PlanTrace(benchmark::State& state, const Trace& trace, int32_t num_experts, int32_t num_slots,
               PolicyKind policy, CacheScope scope) {
  LayerStatistics counts;
  for (auto _ : state) counts = Replay(trace, num_experts, num_slots, policy, scope);
  const auto hits = static_cast<double>(counts.hits);
  state.counters["hit_rate"] = hits / (hits + static_cast<double>(counts.misses));
  state.counters["time_per_plan"] = benchmark::Counter(
      static_cast<double>(trace.num_tokens * trace.num_layers),
      benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

void RegisterAll(const Trace& trace, int32_t num_experts) {
  const struct {
    const char* name;
    CacheScope scope;
  } scopes[] = {{"global", CacheScope::kGlobal}, {"layer", CacheScope::kLayer}};
  for (const double share : {0.125, 0.25, 0.5, 0.75}) {
    const auto num_slots = static_cast<int32_t>(share * num_experts) * trace.num_layers;
    for (const auto& scope : scopes) {
      if (num_slots < Planner::MinSlots(trace.num_layers, trace.top_k, scope.scope)) continue;
      for (const std::string& policy : PolicyNames()) {
        if (policy == "on_demand") continue;  // keeps nothing, so it has no hits
        const std::string name = "PlanTrace/" + std::to_string(num_slots) + "_of_" +
                                 std::to_string(trace.num_layers * num_experts) + "/" + scope.name +
                                 "/" + policy;
        benchmark::RegisterBenchmark(name.c_str(), PlanTrace, trace, num_experts, num_slots,
                                     ParsePolicy(policy), scope.scope)
            ->Unit(benchmark::kMillisecond)
            ->Iterations(1);
      }
    }
  }
}

// Registered while the program starts: benchmark_main runs what is there by then.
[[maybe_unused]] const bool kRegistered = [] {
  const char* path = std::getenv("EXPERTFLOW_TRACE");
  if (path == nullptr) {
    std::printf("policy_bench: EXPERTFLOW_TRACE names no routing trace, so nothing is measured\n");
    return false;
  }
  try {
    static Trace trace = ReadTrace(path);
    const int64_t num_tokens = std::min(
        NumberFromEnvironment("EXPERTFLOW_TRACE_TOKENS", trace.num_tokens), trace.num_tokens);
    trace.num_tokens = num_tokens;
    trace.ids.resize(static_cast<size_t>(num_tokens * trace.num_layers * trace.top_k));
    const int64_t num_seen = trace.ids.empty() ? 0 : *std::ranges::max_element(trace.ids) + 1;
    RegisterAll(trace,
                static_cast<int32_t>(NumberFromEnvironment("EXPERTFLOW_TRACE_EXPERTS", num_seen)));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "policy_bench: %s\n", error.what());
    std::exit(1);
  }
  return true;
}();

}  // namespace
}  // namespace expertflow
