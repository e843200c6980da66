#include "python/simulator_module.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "core/simulator.h"

namespace py = pybind11;

namespace expertflow {
namespace {

using IdArray = py::array_t<uint16_t, py::array::c_style>;
constexpr int64_t kTokensBetweenSignals = 256;

TraceView ViewOf(const IdArray& expert_ids, int32_t num_experts,
                 const std::optional<IdArray>& predicted_ids,
                 const std::optional<IdArray>& predicted_need_q16,
                 const std::optional<IdArray>& first_predicted_ids,
                 const std::optional<IdArray>& first_predicted_need_q16) {
  if (expert_ids.ndim() != 3) {
    throw std::invalid_argument("expert_ids must be [tokens, layers, top_k]");
  }
  TraceView trace{.num_tokens = expert_ids.shape(0),
                  .num_layers = static_cast<int32_t>(expert_ids.shape(1)),
                  .top_k = static_cast<int32_t>(expert_ids.shape(2)),
                  .num_experts = num_experts,
                  .expert_ids = expert_ids.data(),
                  .predictions = {}};
  if (!predicted_ids || !predicted_need_q16) return trace;
  const auto has_shape_of_trace = [&](const IdArray& array) {
    return array.ndim() == 4 && array.shape(0) == expert_ids.shape(0) &&
           array.shape(1) == expert_ids.shape(1) && array.shape(2) == predicted_ids->shape(2) &&
           array.shape(3) == predicted_ids->shape(3);
  };
  if (predicted_ids->ndim() != 4 || !has_shape_of_trace(*predicted_ids) ||
      !has_shape_of_trace(*predicted_need_q16)) {
    throw std::invalid_argument("predictions must be [tokens, layers, distances, candidates]");
  }
  trace.predictions = {.num_distances = static_cast<int32_t>(predicted_ids->shape(2)),
                       .num_candidates = static_cast<int32_t>(predicted_ids->shape(3)),
                       .expert_ids = predicted_ids->data(),
                       .need_q16 = predicted_need_q16->data()};
  if (!first_predicted_ids || !first_predicted_need_q16) return trace;
  for (const IdArray* array : {&*first_predicted_ids, &*first_predicted_need_q16}) {
    if (array->ndim() != 3 || array->shape(0) != expert_ids.shape(0) ||
        array->shape(1) != predicted_ids->shape(2) || array->shape(2) != predicted_ids->shape(3)) {
      throw std::invalid_argument("first predictions must be [tokens, distances, candidates]");
    }
  }
  trace.predictions.first_expert_ids = first_predicted_ids->data();
  trace.predictions.first_need_q16 = first_predicted_need_q16->data();
  return trace;
}

py::dict ToDict(const SimulationResult& result) {
  using py::literals::operator""_a;
  const LayerStatistics& counts = result.counts;
  return py::dict("tokens"_a = result.num_tokens, "hits"_a = counts.hits - result.prefetch_hits,
                  "prefetch_hits"_a = result.prefetch_hits, "late_hits"_a = counts.late_hits,
                  "misses"_a = counts.misses, "evictions"_a = counts.evictions,
                  "demand_bytes"_a = counts.demand_bytes,
                  "prefetch_bytes"_a = counts.prefetch_bytes,
                  "wasted_bytes"_a = counts.wasted_prefetch_bytes, "stall_ns"_a = result.stall_ns,
                  "late_stall_ns"_a = result.late_stall_ns, "horizon_sum"_a = result.horizon_sum);
}

py::dict Simulate(const IdArray& expert_ids, int32_t num_experts,
                  const std::optional<IdArray>& predicted_ids,
                  const std::optional<IdArray>& predicted_need_q16,
                  const std::optional<IdArray>& first_predicted_ids,
                  const std::optional<IdArray>& first_predicted_need_q16, const std::string& policy,
                  const std::string& predictor, int32_t horizon, int32_t num_slots,
                  size_t expert_bytes, const std::string& scope, double bytes_per_second,
                  int64_t latency_ns, size_t chunk_bytes, size_t demand_chunk_bytes,
                  int64_t layer_time_ns, double expert_share, int64_t miss_time_ns,
                  double copy_slowdown, int64_t warmup_tokens) {
  const TraceView trace = ViewOf(expert_ids, num_experts, predicted_ids, predicted_need_q16,
                                 first_predicted_ids, first_predicted_need_q16);
  const bool belady = policy == "belady";
  Simulator simulator(trace, {.num_slots = num_slots,
                              .expert_bytes = expert_bytes,
                              .policy = belady ? PolicyKind::kLru : ParsePolicy(policy),
                              .belady = belady,
                              .scope = ParseScope(scope),
                              .predictor = ParsePredictor(predictor),
                              .horizon = horizon,
                              .link = {bytes_per_second, latency_ns},
                              .chunk_bytes = chunk_bytes,
                              .demand_chunk_bytes = demand_chunk_bytes,
                              .layer_time_ns = layer_time_ns,
                              .expert_share = expert_share,
                              .miss_time_ns = miss_time_ns,
                              .copy_slowdown = copy_slowdown,
                              .warmup_tokens = warmup_tokens});
  while (!simulator.is_done()) {
    {
      const py::gil_scoped_release unlocked;
      for (int64_t i = 0; i < kTokensBetweenSignals && !simulator.is_done(); ++i) {
        simulator.RunToken();
      }
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
  return ToDict(simulator.result());
}

}  // namespace

void DefineSimulator(py::module_& m) {
  m.attr("MAX_HORIZON") = Simulator::kMaxHorizon;
  m.attr("AUTO_HORIZON") = SimulatorConfig::kAutoHorizon;
  m.def("simulate", &Simulate, py::kw_only(), py::arg("expert_ids"), py::arg("num_experts"),
        py::arg("predicted_ids"), py::arg("predicted_need_q16"), py::arg("first_predicted_ids"),
        py::arg("first_predicted_need_q16"), py::arg("policy"), py::arg("predictor"),
        py::arg("horizon"), py::arg("num_slots"), py::arg("expert_bytes"), py::arg("scope"),
        py::arg("bytes_per_second"), py::arg("latency_ns"), py::arg("chunk_bytes"),
        py::arg("demand_chunk_bytes"), py::arg("layer_time_ns"), py::arg("expert_share"),
        py::arg("miss_time_ns"), py::arg("copy_slowdown"), py::arg("warmup_tokens"));
}

}  // namespace expertflow
