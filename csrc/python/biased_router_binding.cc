// _core.BiasedRouter. Contracts are in core/biased_router.h; expertflow/biased_routing.py is the
// Python face.

#include "python/biased_router_binding.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "core/biased_router.h"
#include "python/array_values.h"

namespace py = pybind11;

namespace expertflow {
namespace {

std::unique_ptr<BiasedRouter> MakeBiasedRouter(int32_t num_layers, int32_t num_experts,
                                               int32_t top_k, bool is_sigmoid, int32_t num_groups,
                                               int32_t top_groups, const Array<float>& corrections,
                                               float strength, int32_t keep_top, double budget) {
  const RoutingRule rule{.num_experts = num_experts,
                         .top_k = top_k,
                         .is_sigmoid = is_sigmoid,
                         .num_groups = num_groups,
                         .top_groups = top_groups};
  const std::span<const float> values = Values(corrections);
  return std::make_unique<BiasedRouter>(
      rule, num_layers, std::vector<float>(values.begin(), values.end()),
      BiasOptions{.strength = strength, .keep_top = keep_top, .budget = budget});
}

// The ids [tokens, k] with the changes, and how many there are.
std::pair<Array<int64_t>, int64_t> Reroute(BiasedRouter& router, int32_t layer,
                                           const Array<float>& logits,
                                           const Array<uint8_t>& is_resident,
                                           const Array<int64_t>& expert_ids) {
  Array<int64_t> ids(
      std::vector<py::ssize_t>(expert_ids.shape(), expert_ids.shape() + expert_ids.ndim()),
      expert_ids.data());
  const int64_t num_changed = router.Reroute(layer, Values(logits), Values(is_resident),
                                             {ids.mutable_data(), static_cast<size_t>(ids.size())});
  return {std::move(ids), num_changed};
}

std::vector<std::pair<int64_t, int64_t>> Counts(const BiasedRouter& router) {
  std::vector<std::pair<int64_t, int64_t>> counts;
  for (const RouteCounts& layer : router.counts()) {
    counts.emplace_back(layer.routes, layer.changed);
  }
  return counts;
}

}  // namespace

void DefineBiasedRouter(py::module_& m) {
  py::class_<BiasedRouter>(m, "BiasedRouter")
      .def(py::init(&MakeBiasedRouter), py::kw_only(), py::arg("num_layers"),
           py::arg("num_experts"), py::arg("top_k"), py::arg("is_sigmoid"), py::arg("num_groups"),
           py::arg("top_groups"), py::arg("corrections"), py::arg("strength"), py::arg("keep_top"),
           py::arg("budget"))
      .def("reroute", &Reroute, py::arg("layer"), py::arg("logits"), py::arg("is_resident"),
           py::arg("expert_ids"))
      .def("counts", &Counts, "(routes, changed) of each layer.")
      .def("reset_counts", &BiasedRouter::ResetCounts);
}

}  // namespace expertflow
