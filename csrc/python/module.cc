// expertflow._core: the control plane. Contracts are in the C++ headers; expertflow/cache.py is the
// Python face.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <tuple>
#include <vector>

#include "core/errors.h"
#include "core/eviction/policy.h"
#include "core/expert_layout.h"
#include "core/planner.h"
#include "host/checkpoint_source.h"
#include "host/expert_cache.h"
#include "host/ram_pool.h"
#include "python/biased_router_binding.h"
#include "python/build_info.h"
#include "python/cuda_module.h"
#include "python/cuda_predictor_binding.h"
#include "python/predictor_binding.h"
#include "python/registered_cache.h"
#include "python/simulator_module.h"

namespace py = pybind11;

namespace expertflow {
namespace {

using SegmentTuple = std::tuple<std::string, std::string, size_t>;
using ExtentArray = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

ExpertLayout MakeLayout(const std::vector<SegmentTuple>& segments) {
  std::vector<SegmentSpec> specs;
  for (const auto& [role, dtype, num_elements] : segments) {
    specs.push_back({role, ParseDType(dtype), num_elements});
  }
  return ExpertLayout(specs);
}

std::vector<std::tuple<std::string, std::string, size_t, size_t>> Segments(
    const ExpertLayout& layout) {
  std::vector<std::tuple<std::string, std::string, size_t, size_t>> segments;
  for (const Segment& s : layout.segments()) {
    segments.emplace_back(s.role, DTypeName(s.dtype), s.offset_bytes, s.num_bytes);
  }
  return segments;
}

std::shared_ptr<CheckpointSource> MakeSource(std::vector<std::string> files,
                                             const ExpertLayout& layout, const ExtentArray& array) {
  if (array.ndim() != 3 || array.shape(2) != 5) {
    throw std::invalid_argument("extents must have shape [experts, extents per expert, 5]");
  }
  std::vector<Extent> extents;
  extents.reserve(static_cast<size_t>(array.shape(0) * array.shape(1)));
  const int64_t* value = array.data();
  for (py::ssize_t i = 0; i < array.shape(0) * array.shape(1); ++i, value += 5) {
    for (int column = 0; column < 4; ++column) {
      if (value[column] < 0) throw std::invalid_argument("an extent has a negative number");
    }
    extents.push_back({static_cast<size_t>(value[0]), static_cast<size_t>(value[1]),
                       static_cast<size_t>(value[2]), static_cast<size_t>(value[3]),
                       DTypeFromCode(value[4])});
  }
  return std::make_shared<CheckpointSource>(std::move(files), layout, std::move(extents),
                                            static_cast<size_t>(array.shape(1)));
}

using RegisteredHostCache = RegisteredCache<ExpertCache, Backend::kHost>;

// The memory of one slot as a uint8 array, without a copy; it keeps the cache alive.
py::array_t<uint8_t> SlotMemory(std::shared_ptr<RegisteredHostCache> cache, int32_t slot) {
  if (slot < 0 || slot >= cache->cache().num_slots()) throw py::index_error("no such slot");
  const auto* data = reinterpret_cast<const uint8_t*>(cache->cache().slot_data(SlotId{slot}));
  const auto num_bytes = static_cast<py::ssize_t>(cache->cache().slot_bytes());
  return py::array_t<uint8_t>(num_bytes, data, py::cast(cache));
}

// One expert of a pool as a uint8 array to fill, without a copy; it keeps the pool alive.
py::array_t<uint8_t> PoolMemory(std::shared_ptr<RamPool> pool, size_t expert) {
  if (expert >= pool->num_experts()) throw py::index_error("no such expert");
  const auto index = static_cast<ExpertIndex>(expert);
  const auto* data = reinterpret_cast<const uint8_t*>(pool->expert_data(index));
  return py::array_t<uint8_t>(static_cast<py::ssize_t>(pool->expert_bytes()), data, py::cast(pool));
}

void TranslateSystemError(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (
      const std::system_error& e) {  // OSError(errno, ...) becomes FileNotFoundError and its like
    const py::tuple arguments = py::make_tuple(e.code().value(), e.what());
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  }
}

std::shared_ptr<RegisteredHostCache> MakeCache(std::shared_ptr<ExpertSource> source,
                                               const ExpertLayout& layout, int32_t num_layers,
                                               int32_t num_experts, int32_t top_k,
                                               int32_t num_slots, const std::string& policy,
                                               const std::string& scope, double decay,
                                               size_t chunk_bytes, int32_t num_threads) {
  const ExpertCacheOptions options =
      MakeCacheOptions(layout, num_layers, num_experts, top_k, num_slots, policy, scope, decay,
                       chunk_bytes, num_threads);
  return std::make_shared<RegisteredHostCache>(
      std::make_shared<ExpertCache>(std::move(source), layout, options));
}

void DefineSources(py::module_& m) {
  py::class_<ExpertLayout>(m, "ExpertLayout")
      .def(py::init(&MakeLayout), py::arg("segments"))
      .def_property_readonly("segments", &Segments)
      .def_property_readonly("slot_bytes", &ExpertLayout::slot_bytes)
      .def_property_readonly("pool_bytes_per_expert", &ExpertLayout::pool_bytes_per_expert);
  py::class_<ExpertSource, std::shared_ptr<ExpertSource>>(m, "ExpertSource");
  py::class_<CheckpointSource, ExpertSource, std::shared_ptr<CheckpointSource>>(m,
                                                                                "CheckpointSource")
      .def(py::init(&MakeSource), py::arg("files"), py::arg("layout"), py::arg("extents"));
  py::class_<RamPool, ExpertSource, std::shared_ptr<RamPool>>(m, "RamPool")
      .def(py::init<const ExpertLayout&, size_t, int>(), py::arg("layout"), py::arg("num_experts"),
           py::arg("numa_node") = -1)
      .def_property_readonly("num_bytes", &RamPool::num_bytes)
      .def("expert_memory", &PoolMemory, py::arg("expert"))
      .def(
          "start_fill",
          [](std::shared_ptr<RamPool> pool, std::shared_ptr<CheckpointSource> source,
             int32_t num_threads) {
            return std::make_unique<PoolFill>(std::move(pool), std::move(source), num_threads);
          },
          py::arg("source"), py::arg("num_threads"));
  py::class_<PoolFill>(m, "PoolFill")
      .def_property_readonly("bytes_done", &PoolFill::bytes_done)
      .def_property_readonly("bytes_total", &PoolFill::bytes_total)
      .def("cancel", &PoolFill::Cancel)
      .def(
          "wait",
          [](PoolFill& fill, double timeout_seconds) {
            const py::gil_scoped_release unlocked;
            if (!fill.WaitFor(std::chrono::duration<double>(timeout_seconds))) return false;
            fill.Join();
            return true;
          },
          py::arg("timeout_seconds"),
          "True once everything is read; raises what a reader raised, RuntimeError if cancelled.");
}

void DefineCache(py::module_& m) {
  py::class_<RegisteredHostCache, std::shared_ptr<RegisteredHostCache>> cache_class(m,
                                                                                    "ExpertCache");
  cache_class.def(py::init(&MakeCache), py::arg("source"), py::arg("layout"), py::arg("num_layers"),
                  py::arg("num_experts"), py::arg("top_k"), py::arg("num_slots"), py::arg("policy"),
                  py::arg("scope"), py::arg("decay"), py::arg("chunk_bytes"),
                  py::arg("num_threads"));
  cache_class.def("slot_memory", &SlotMemory, py::arg("slot"));
  DefineCacheProperties(cache_class);
  m.def("min_slots", [](int32_t num_layers, int32_t top_k, const std::string& scope) {
    return Planner::MinSlots(num_layers, top_k, ParseScope(scope));
  });
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  py::register_exception_translator(&TranslateSystemError);
  m.attr("DTYPE_CODES") =
      py::dict(py::arg("float32") = 0, py::arg("bfloat16") = 1, py::arg("float16") = 2);
  m.attr("POLICIES") = py::tuple(py::cast(PolicyNames()));
  m.def("build_info", &BuildInfo);
  DefineSources(m);
  DefineCache(m);
  DefineCuda(m);
  DefinePredictor(m);
  DefineBiasedRouter(m);
  DefineCudaPredictor(m);
  DefineSimulator(m);
}

}  // namespace expertflow
