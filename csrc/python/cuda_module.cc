#include "python/cuda_module.h"

#include <pybind11/stl.h>

#ifdef EXPERTFLOW_WITH_CUDA
#include <exception>
#include <memory>
#include <optional>
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

// What the decode kernels must know of the experts, from the names of their tensors: with biases
// they are those of gpt-oss.
ExpertMlpShape MlpShape(const ExpertLayout& layout, int32_t hidden) {
  ExpertMlpShape shape{.kind = ExpertMlpKind::kStandard,
                       .dtype = layout.segments().front().dtype,
                       .hidden = hidden,
                       .intermediate = 0,
                       .slot_stride_bytes = layout.slot_bytes(),
                       .gate_up_offset_bytes = 0,
                       .down_offset_bytes = 0};
  for (const Segment& segment : layout.segments()) {
    if (segment.role == "gate_up_proj") shape.gate_up_offset_bytes = segment.offset_bytes;
    if (segment.role == "gate_up_proj_bias") {
      shape.gate_up_bias_offset_bytes = segment.offset_bytes;
      shape.kind = ExpertMlpKind::kGptOss;
    }
    if (segment.role == "down_proj_bias") shape.down_bias_offset_bytes = segment.offset_bytes;
    if (segment.role == "down_proj") {
      shape.down_offset_bytes = segment.offset_bytes;
      const size_t num_elements = segment.num_bytes / ElementBytes(segment.dtype);
      shape.intermediate = static_cast<int32_t>(num_elements) / hidden;
    }
  }
  return shape;
}

std::shared_ptr<RegisteredCudaCache> MakeCache(std::shared_ptr<ExpertSource> source,
                                               const ExpertLayout& layout, int32_t num_layers,
                                               int32_t num_experts, int32_t top_k,
                                               int32_t num_slots, const std::string& policy,
                                               const std::string& scope, double decay,
                                               size_t chunk_bytes, int32_t num_threads, int device,
                                               std::optional<int32_t> mlp_hidden) {
  const ExpertCacheOptions options =
      MakeCacheOptions(layout, num_layers, num_experts, top_k, num_slots, policy, scope, decay,
                       chunk_bytes, num_threads);
  std::optional<ExpertMlpShape> mlp;
  if (mlp_hidden) mlp = MlpShape(layout, *mlp_hidden);
  std::shared_ptr<cuda::ExpertCache> cache;
  {
    const py::gil_scoped_release unlocked;
    cache = std::make_shared<cuda::ExpertCache>(std::move(source), layout, options, device, mlp);
  }
  return std::make_shared<RegisteredCudaCache>(std::move(cache));
}

// All slots for torch.as_tensor, which shares their memory.
py::dict SlotsInterface(RegisteredCudaCache& registered) {
  using py::literals::operator""_a;
  const cuda::ExpertCache& cache = registered.cache();
  const auto address = reinterpret_cast<uintptr_t>(cache.slot_data(SlotId{0}));
  return py::dict("shape"_a = py::make_tuple(cache.num_slots(), cache.slot_bytes()),
                  "typestr"_a = "|u1", "data"_a = py::make_tuple(address, false), "version"_a = 3);
}

void TranslateCudaError(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const CudaError& e) {
    const py::object type = py::module_::import("expertflow.errors").attr("CudaError");
    PyErr_SetString(type.ptr(), e.what());
  }
}

void DefinePool(py::module_& m) {
  py::class_<PinnedPool, ExpertSource, std::shared_ptr<PinnedPool>>(m, "PinnedPool")
      .def(py::init<std::shared_ptr<RamPool>, int, bool>(), py::arg("pool"), py::arg("device"),
           py::arg("is_required"))
      .def_property_readonly("failure", &PinnedPool::failure)
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
  py::register_exception_translator(&TranslateCudaError);
  DefinePool(m);
  py::class_<RegisteredCudaCache, std::shared_ptr<RegisteredCudaCache>> cache_class(
      m, "CudaExpertCache");
  cache_class.def(py::init(&MakeCache), py::arg("source"), py::arg("layout"), py::arg("num_layers"),
                  py::arg("num_experts"), py::arg("top_k"), py::arg("num_slots"), py::arg("policy"),
                  py::arg("scope"), py::arg("decay"), py::arg("chunk_bytes"),
                  py::arg("num_threads"), py::arg("device"), py::arg("mlp_hidden"));
  cache_class.def("slots_interface", &SlotsInterface);
  DefineCacheProperties(cache_class);
}

}  // namespace expertflow
#else
namespace expertflow {

void DefineCuda(pybind11::module_&) {}

}  // namespace expertflow
#endif
