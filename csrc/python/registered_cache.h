#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "core/cache_control.h"
#include "core/expert_layout.h"
#include "core/prefetcher.h"
#include "core/statistics.h"
#include "host/cache_registry.h"
#include "python/array_values.h"

namespace expertflow {

// An expert cache and its entry in the registry.
template <class Cache, Backend kBackend>
class RegisteredCache {
 public:
  explicit RegisteredCache(std::shared_ptr<Cache> cache)
      : cache_(std::move(cache)), handle_(RegisterCache(kBackend, cache_)) {}
  ~RegisteredCache() {
    UnregisterCache(handle_);
    const pybind11::gil_scoped_release unlocked;
    cache_.reset();
  }
  RegisteredCache(const RegisteredCache&) = delete;
  RegisteredCache& operator=(const RegisteredCache&) = delete;

  Cache& cache() { return *cache_; }
  int64_t handle() const { return handle_; }

 private:
  std::shared_ptr<Cache> cache_;
  int64_t handle_;
};

ExpertCacheOptions MakeCacheOptions(const ExpertLayout& layout, int32_t num_layers,
                                    int32_t num_experts, int32_t top_k, int32_t num_slots,
                                    const std::string& policy, const std::string& scope,
                                    double decay, size_t chunk_bytes, int32_t num_threads);

// Totals, with the layers' own figures under "layers".
pybind11::dict StatisticsDict(const std::vector<LayerStatistics>& layers,
                              const PrefetchStatistics& prefetched, int32_t horizon);

// [distances, num_experts] from Python.
using NeedArray = Array<float>;

// Throws std::invalid_argument for another shape.
std::span<const float> NeedValues(const NeedArray& need, int32_t num_experts);

// The properties that the caches of all backends have.
template <class Class>
void DefineCacheProperties(Class& cache_class) {
  using Registered = typename Class::type;
  cache_class.def_property_readonly("handle", &Registered::handle)
      .def_property_readonly("num_slots", [](Registered& c) { return c.cache().num_slots(); })
      .def_property_readonly("bandwidth_bytes_per_second",
                             [](Registered& c) { return c.cache().bandwidth_bytes_per_second(); })
      .def("residents",
           [](Registered& c, int32_t layer) {
             const std::vector<uint8_t> is_resident = c.cache().Residents(layer);
             return pybind11::array_t<uint8_t>(static_cast<pybind11::ssize_t>(is_resident.size()),
                                               is_resident.data());
           })
      .def_property_readonly("horizon", [](Registered& c) { return c.cache().horizon(); })
      .def(
          "set_horizon", [](Registered& c, int32_t horizon) { c.cache().SetHorizon(horizon); },
          pybind11::arg("horizon"))
      .def(
          "begin_token",
          [](Registered& c, int32_t num_tokens) { return c.cache().BeginToken(num_tokens); },
          pybind11::arg("num_tokens"), pybind11::call_guard<pybind11::gil_scoped_release>())
      .def(
          "begin_prefetch", [](Registered& c) { return c.cache().BeginPrefetch(); },
          pybind11::call_guard<pybind11::gil_scoped_release>())
      .def(
          "prefetch_predicted",
          [](Registered& c, const NeedArray& need) {
            const std::span<const float> values = NeedValues(need, c.cache().num_experts());
            const pybind11::gil_scoped_release unlocked;
            return c.cache().PrefetchPredicted(values);
          },
          pybind11::arg("need"))
      .def("statistics",
           [](Registered& c) {
             auto& cache = c.cache();
             return StatisticsDict(cache.statistics(), cache.prefetch_statistics(),
                                   cache.horizon());
           })
      .def("reset_statistics", [](Registered& c) { c.cache().ResetStatistics(); });
}

}  // namespace expertflow
