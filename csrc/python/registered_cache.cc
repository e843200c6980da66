#include "python/registered_cache.h"

#include <stdexcept>

#include "core/planner.h"

namespace expertflow {
namespace {

namespace py = pybind11;

py::dict ToDict(const LayerStatistics& s) {
  using py::literals::operator""_a;
  return py::dict("hits"_a = s.hits, "late_hits"_a = s.late_hits, "misses"_a = s.misses,
                  "demand_bytes"_a = s.demand_bytes, "prefetch_bytes"_a = s.prefetch_bytes,
                  "wasted_prefetch_bytes"_a = s.wasted_prefetch_bytes, "stall_us"_a = s.stall_us,
                  "evictions"_a = s.evictions);
}

}  // namespace

ExpertCacheOptions MakeCacheOptions(const ExpertLayout& layout, int32_t num_layers,
                                    int32_t num_experts, int32_t top_k, int32_t num_slots,
                                    const std::string& policy, const std::string& scope,
                                    double decay, size_t chunk_bytes, int32_t num_threads) {
  const PlannerConfig planner{.top_k = top_k,
                              .expert_bytes = layout.slot_bytes(),
                              .policy = ParsePolicy(policy),
                              .scope = ParseScope(scope),
                              .decay_per_token = decay};
  return {.num_layers = num_layers,
          .num_experts = num_experts,
          .num_slots = num_slots,
          .planner = planner,
          .chunk_bytes = chunk_bytes,
          .num_threads = num_threads};
}

py::dict StatisticsDict(const std::vector<LayerStatistics>& layers,
                        const PrefetchStatistics& prefetched, int32_t horizon) {
  LayerStatistics total;
  py::list of_layers;
  for (const LayerStatistics& layer : layers) {
    total += layer;
    of_layers.append(ToDict(layer));
  }
  py::dict result = ToDict(total);
  result["prefetch_hits"] = prefetched.hits;
  result["prefetches_used"] = prefetched.used;
  result["prefetches_wasted"] = prefetched.wasted;
  result["horizon"] = horizon;
  result["layers"] = of_layers;
  return result;
}

std::span<const float> NeedValues(const NeedArray& need, int32_t num_experts) {
  if (need.ndim() != 2 || need.shape(1) != num_experts) {
    throw std::invalid_argument("need must be [distances, " + std::to_string(num_experts) + "]");
  }
  return {need.data(), static_cast<size_t>(need.size())};
}

}  // namespace expertflow
