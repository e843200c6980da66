#include "python/cuda_module.h"

#ifdef EXPERTFLOW_WITH_CUDA
#include <memory>
#include <string>
#include <utility>

#include "cuda/cuda_error.h"
#include "cuda/expert_cache.h"
#include "cuda/pinned_pool.h"
#include "host/ram_pool.h"
#include "python/registered_cache.h"

namespace expertflow {
namespace {

namespace py = pybind11;

using RegisteredCudaCache = RegisteredCache<cuda::ExpertCache, Backend::kCuda>;

std::shared_ptr<RegisteredCudaCache> MakeCache(
    std::shared_ptr<ExpertSource> source, const ExpertLayout& layout, int32_t num_layers,
    int32_t num_experts, int32_t top_k, int32_t num_slots, const std::string& policy,
    const std::string& scope, double decay, size_t chunk_bytes, int32_t num_threads, int device) {
  const ExpertCacheOptions options =
      MakeCacheOptions(layout, num_layers, num_experts, top_k, num_slots, policy, scope, decay,
                       chunk_bytes, num_threads);
  const py::gil_scoped_release unlocked;
  return std::make_shared<RegisteredCudaCache>(
      std::make_shared<cuda::ExpertCache>(std::move(source), layout, options, device));
}

// One slot for torch.as_tensor, which shares its memory.
py::dict SlotInterface(RegisteredCudaCache& registered, int32_t slot) {
  cuda::ExpertCache& cache = registered.cache();
  if (slot < 0 || slot >= cache.num_slots()) throw py::index_error("no such slot");
  using py::literals::operator""_a;
  const auto address = reinterpret_cast<uintptr_t>(cache.slot_data(SlotId{slot}));
  return py::dict("shape"_a = py::make_tuple(cache.slot_bytes()), "typestr"_a = "|u1",
                  "data"_a = py::make_tuple(address, false), "version"_a = 3);
}

void DefinePool(py::module_& m) {
  py::class_<PinnedPool, ExpertSource, std::shared_ptr<PinnedPool>>(m, "PinnedPool")
      .def(py::init<std::shared_ptr<RamPool>, int>(), py::arg("pool"), py::arg("device"))
      .def_property_readonly("is_pinned", &PinnedPool::is_pinned)
      .def("pin", &PinnedPool::Pin, py::arg("first"), py::arg("last"),
           py::call_guard<py::gil_scoped_release>())
      .def(
          "start_fill",
          [](std::shared_ptr<PinnedPool> pinned, std::shared_ptr<RamPool> pool,
             std::shared_ptr<ExpertSource> source, int32_t num_threads) {
            return std::make_unique<PoolFill>(
                std::move(pool), std::move(source), num_threads,
                [pinned](size_t first, size_t last) { pinned->Pin(first, last); });
          },
          py::arg("pool"), py::arg("source"), py::arg("num_threads"));
}

}  // namespace

void DefineCuda(py::module_& m) {
  py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  DefinePool(m);
  py::class_<RegisteredCudaCache, std::shared_ptr<RegisteredCudaCache>> cache_class(
      m, "CudaExpertCache");
  cache_class.def(py::init(&MakeCache), py::arg("source"), py::arg("layout"), py::arg("num_layers"),
                  py::arg("num_experts"), py::arg("top_k"), py::arg("num_slots"), py::arg("policy"),
                  py::arg("scope"), py::arg("decay"), py::arg("chunk_bytes"),
                  py::arg("num_threads"), py::arg("device"));
  cache_class.def("slot_interface", &SlotInterface, py::arg("slot"));
  DefineCacheProperties(cache_class);
}

}  // namespace expertflow
#else
namespace expertflow {

void DefineCuda(pybind11::module_&) {}

}  // namespace expertflow
#endif
