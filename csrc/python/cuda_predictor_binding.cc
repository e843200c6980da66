// _core.CudaPredictor. Contracts are in cuda/device_predictor.h; expertflow/device_predictor.py is
// the Python face, and sees to what the pointers point to.

#include "python/cuda_predictor_binding.h"

#ifdef EXPERTFLOW_WITH_CUDA
#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>

#include "core/dtype.h"
#include "core/predictor/predictor.h"
#include "cuda/device_guard.h"
#include "cuda/device_predictor.h"

namespace py = pybind11;

namespace expertflow {
namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

std::unique_ptr<DevicePredictor> Make(const Predictor& host, int device) {
  const py::gil_scoped_release unlocked;
  const DeviceGuard guard(device);
  const RoutingRule& rule = host.config().rule;
  return std::make_unique<DevicePredictor>(
      host, DevicePredictor::Options{.list_size = std::min(2 * rule.top_k, rule.num_experts)});
}

template <class T>
T* Pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void Observe(DevicePredictor& predictor, int32_t layer, uintptr_t hidden, int64_t dtype_code,
             uintptr_t token_id, uintptr_t stream) {
  predictor.Observe(layer,
                    {.hidden = Pointer<const void>(hidden),
                     .dtype = DTypeFromCode(dtype_code),
                     .id = Pointer<const int64_t>(token_id)},
                    Pointer<CUstream_st>(stream));
}

py::array_t<float> Need(const DevicePredictor& predictor, int32_t distance) {
  std::span<const float> need;
  {
    const py::gil_scoped_release unlocked;
    need = predictor.need(distance);
  }
  return py::array_t<float>(static_cast<py::ssize_t>(need.size()), need.data());
}

}  // namespace

void DefineCudaPredictor(py::module_& m) {
  py::class_<DevicePredictor>(m, "CudaPredictor")
      .def(py::init(&Make), py::arg("host"), py::arg("device"))
      .def("begin_pass",
           [](DevicePredictor& p, uintptr_t stream) { p.BeginPass(Pointer<CUstream_st>(stream)); })
      .def("join_learning", [](DevicePredictor& p,
                               uintptr_t stream) { p.JoinLearning(Pointer<CUstream_st>(stream)); })
      .def("observe", &Observe, py::arg("layer"), py::arg("hidden"), py::arg("dtype"),
           py::arg("token_id"), py::arg("stream"))
      .def("learn", [](DevicePredictor& p, int32_t layer,
                       uintptr_t stream) { p.Learn(layer, Pointer<CUstream_st>(stream)); })
      .def_property_readonly("num_distances", &DevicePredictor::num_distances)
      .def("need", &Need)
      .def(
          "copy_from", [](DevicePredictor& p, const Predictor& host) { p.CopyFrom(host.state()); },
          Unlocked())
      .def(
          "copy_to", [](const DevicePredictor& p, Predictor& host) { p.CopyTo(host.state()); },
          Unlocked());
}

}  // namespace expertflow
#else
namespace expertflow {

void DefineCudaPredictor(pybind11::module_&) {}

}  // namespace expertflow
#endif
