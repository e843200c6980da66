// Replays recorded routing through the planner and its policies, and through Belady's rule:
//
//   eviction_bench IDS.npy num_experts scope slots_per_layer...
//
// IDS.npy holds expert ids [tokens, layers, top_k] (bench/eviction_bench.py makes it of a trace).
// Nothing is prefetched. Prints one line per policy and size: policy, slots per layer, hit rate
// over the second half of the tokens, CPU microseconds per planned layer.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <limits>
#include <queue>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/planner.h"
#include "npy_trace.h"

namespace expertflow {
namespace {

struct Routes {
  int32_t num_layers;
  int32_t num_experts;
  int32_t top_k;
  std::vector<int64_t> ids;  // [tokens, layers, top_k]

  int64_t num_plans() const { return std::ssize(ids) / top_k; }  // one per token and layer
  std::span<const int64_t> plan(int64_t i) const {
    return std::span(ids).subspan(static_cast<size_t>(i * top_k), static_cast<size_t>(top_k));
  }
};

struct Result {
  double hit_rate;
  double us_per_layer;
};

Result Replay(const Routes& routes, PolicyKind policy, CacheScope scope, int32_t slots_per_layer) {
  SlotTable table(routes.num_layers, routes.num_experts, slots_per_layer * routes.num_layers);
  Planner planner(table,
                  {.top_k = routes.top_k, .expert_bytes = 1, .policy = policy, .scope = scope});
  const std::clock_t start = std::clock();
  for (int64_t i = 0; i < routes.num_plans(); ++i) {
    if (i == routes.num_plans() / 2) planner.ResetStatistics();
    const auto layer = static_cast<int32_t>(i % routes.num_layers);
    const Plan* plan = planner.PlanLayer(layer, routes.plan(i), 1, i + 1);
    for (const PlanRow& row : plan->rows) {
      if (row.state == RowState::kMiss) planner.Publish(row.slot);
    }
  }
  const double us = static_cast<double>(std::clock() - start) * 1e6 / CLOCKS_PER_SEC;
  LayerStatistics total;
  for (const LayerStatistics& layer : planner.statistics()) total += layer;
  return {static_cast<double>(total.hits) / static_cast<double>(total.hits + total.misses),
          us / static_cast<double>(routes.num_plans())};
}

// For every routed id, the plan that routes to the same expert next.
std::vector<int64_t> NextUses(const Routes& routes) {
  std::vector<int64_t> next_of(static_cast<size_t>(routes.num_layers * routes.num_experts),
                               std::numeric_limits<int64_t>::max());
  std::vector<int64_t> next_uses(routes.ids.size());
  for (int64_t r = std::ssize(routes.ids) - 1; r >= 0; --r) {
    const int64_t plan = r / routes.top_k;
    const int64_t id = routes.ids[static_cast<size_t>(r)];
    int64_t& next =
        next_of[static_cast<size_t>(plan % routes.num_layers * routes.num_experts + id)];
    next_uses[static_cast<size_t>(r)] = std::exchange(next, plan);
  }
  return next_uses;
}

// One resident set per layer, or one for all: what is needed last goes first. An expert that is
// fetched must be kept at least for its own plan.
double BeladyHitRate(const Routes& routes, CacheScope scope, int32_t slots_per_layer) {
  const std::vector<int64_t> next_uses = NextUses(routes);
  const bool per_layer = scope == CacheScope::kLayer;
  const size_t num_sets = per_layer ? static_cast<size_t>(routes.num_layers) : 1;
  const int64_t num_slots = int64_t{slots_per_layer} * (per_layer ? 1 : routes.num_layers);
  constexpr int64_t kAbsent = -1;
  std::vector<int64_t> next_of(static_cast<size_t>(routes.num_layers * routes.num_experts),
                               kAbsent);
  std::vector<int64_t> num_resident(num_sets);
  // By next use; entries that an earlier hit has made stale are dropped when they come up.
  std::vector<std::priority_queue<std::pair<int64_t, size_t>>> farthest(num_sets);
  int64_t hits = 0;
  for (int64_t i = 0; i < routes.num_plans(); ++i) {
    const auto layer = static_cast<int32_t>(i % routes.num_layers);
    const size_t set = per_layer ? static_cast<size_t>(layer) : 0;
    for (int64_t r = i * routes.top_k; r < (i + 1) * routes.top_k; ++r) {
      const auto expert =
          static_cast<size_t>(layer * routes.num_experts + routes.ids[static_cast<size_t>(r)]);
      const bool is_hit = next_of[expert] != kAbsent;
      if (is_hit && i >= routes.num_plans() / 2) ++hits;
      if (!is_hit) ++num_resident[set];
      next_of[expert] = next_uses[static_cast<size_t>(r)];
    }
    while (num_resident[set] > num_slots) {
      const auto [next_use, expert] = farthest[set].top();
      farthest[set].pop();
      if (next_of[expert] != next_use) continue;
      next_of[expert] = kAbsent;
      --num_resident[set];
    }
    for (int64_t r = i * routes.top_k; r < (i + 1) * routes.top_k; ++r) {
      const auto id = static_cast<int32_t>(routes.ids[static_cast<size_t>(r)]);
      farthest[set].emplace(next_uses[static_cast<size_t>(r)],
                            static_cast<size_t>(layer * routes.num_experts + id));
    }
  }
  return static_cast<double>(hits) /
         static_cast<double>((routes.num_plans() - routes.num_plans() / 2) * routes.top_k);
}

int Run(std::span<char*> arguments) {
  if (arguments.size() < 5) {
    throw std::runtime_error("usage: eviction_bench IDS.npy num_experts scope slots_per_layer...");
  }
  Trace trace = ReadTrace(arguments[1]);
  const Routes routes{trace.num_layers, std::atoi(arguments[2]), trace.top_k, std::move(trace.ids)};
  const CacheScope scope = ParseScope(arguments[3]);
  for (const char* size : arguments.subspan(4)) {
    const int32_t slots_per_layer = std::atoi(size);
    for (const char* policy : {"lru", "decayed_frequency", "predicted_need"}) {
      const Result result = Replay(routes, ParsePolicy(policy), scope, slots_per_layer);
      std::printf("%s %d %.6f %.3f\n", policy, slots_per_layer, result.hit_rate,
                  result.us_per_layer);
    }
    std::printf("belady %d %.6f 0\n", slots_per_layer,
                BeladyHitRate(routes, scope, slots_per_layer));
  }
  return EXIT_SUCCESS;
}

}  // namespace
}  // namespace expertflow

int main(int argc, char** argv) {
  try {
    return expertflow::Run({argv, static_cast<size_t>(argc)});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "eviction_bench: %s\n", error.what());
    return EXIT_FAILURE;
  }
}
