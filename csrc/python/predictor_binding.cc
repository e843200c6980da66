// _core.Predictor. Contracts are in core/predictor/predictor.h; expertflow/predictor.py is the
// Python face.

#include "python/predictor_binding.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/predictor/predictor.h"
#include "python/array_values.h"

namespace py = pybind11;

namespace expertflow {
namespace {

using FloatArray = Array<float>;
using IdArray = Array<int64_t>;

std::vector<float> Copy(const FloatArray& array) {
  return {array.data(), array.data() + array.size()};
}

py::array_t<float> ToArray(std::span<const float> values) {
  return py::array_t<float>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::unique_ptr<Predictor> MakePredictor(const FloatArray& weights, const FloatArray& biases,
                                         const FloatArray& corrections, int32_t top_k,
                                         bool is_sigmoid, int32_t num_groups, int32_t top_groups,
                                         int32_t max_distance, int32_t num_token_buckets) {
  if (weights.ndim() != 3) throw std::invalid_argument("weights must be [layers, experts, hidden]");
  const PredictorConfig config{.num_layers = static_cast<int32_t>(weights.shape(0)),
                               .hidden = static_cast<int32_t>(weights.shape(2)),
                               .max_distance = max_distance,
                               .num_token_buckets = num_token_buckets,
                               .rule = {.num_experts = static_cast<int32_t>(weights.shape(1)),
                                        .top_k = top_k,
                                        .is_sigmoid = is_sigmoid,
                                        .num_groups = num_groups,
                                        .top_groups = top_groups}};
  return std::make_unique<Predictor>(config,
                                     RouterWeights{Copy(weights), Copy(biases), Copy(corrections)});
}

// What was learned, as arrays that share the predictor's memory: reading them saves it, writing
// into them loads it.
py::dict State(const py::object& self) {
  auto& predictor = self.cast<Predictor&>();
  LearnedState& state = predictor.state();
  const auto num_layers = static_cast<size_t>(predictor.config().num_layers);
  const size_t num_pairs = state.first_pair.back();
  const auto view = [&self](void* data, std::vector<size_t> shape) {
    return py::array_t<float>(std::move(shape), static_cast<float*>(data), self);
  };
  static_assert(sizeof(ScoreScalars) == 3 * sizeof(float));
  static_assert(sizeof(NeedCalibration) == 6 * sizeof(float));
  py::dict arrays;
  arrays["weights"] =
      view(state.weights.data(), {num_pairs, state.num_experts, state.num_features});
  arrays["scalars"] = view(state.scalars.data(), {num_pairs, 3});
  arrays["calibrations"] = view(state.calibrations.data(), {num_pairs, 6});
  arrays["token_means"] =
      view(state.token_means.data(), {num_layers, state.num_buckets, state.num_experts});
  arrays["token_counts"] = view(state.token_counts.data(), {num_layers, state.num_buckets});
  arrays["deviations"] = view(state.deviations.data(), {num_layers});
  arrays["num_tokens"] = view(state.num_tokens.data(), {num_layers});
  return arrays;
}

// Runs the predictor over `hidden` [tokens, sources, hidden] as if decoding: each token is foreseen
// before it is learned from. The sources are the layers, or the embedding and then the layers.
// Returns ids [tokens, sources, distances, m], the most needed first, and their need; where there
// is no such layer ids and need are 0.
std::pair<py::array_t<int32_t>, py::array_t<float>> Replay(Predictor& predictor,
                                                           const FloatArray& hidden,
                                                           const IdArray& tokens, size_t m) {
  const PredictorConfig& config = predictor.config();
  const bool has_embeddings = hidden.ndim() == 3 && hidden.shape(1) == config.num_layers + 1;
  if (hidden.ndim() != 3 || (hidden.shape(1) != config.num_layers && !has_embeddings)) {
    throw std::invalid_argument("hidden must be [tokens, layers, hidden], or have one layer more");
  }
  const auto num_tokens = static_cast<size_t>(hidden.shape(0));
  if (tokens.size() != 0 && static_cast<size_t>(tokens.size()) != num_tokens) {
    throw std::invalid_argument("tokens must be empty or [tokens]");
  }
  if (m > static_cast<size_t>(config.rule.num_experts)) {
    throw std::invalid_argument("more experts than a layer has");
  }
  const auto num_sources = static_cast<size_t>(hidden.shape(1));
  const auto num_distances = static_cast<size_t>(config.max_distance);
  const std::vector<size_t> shape = {num_tokens, num_sources, num_distances, m};
  py::array_t<int32_t> ids(shape);
  py::array_t<float> needs(shape);
  int32_t* id = ids.mutable_data();
  float* need = needs.mutable_data();
  std::fill_n(id, ids.size(), 0);
  std::fill_n(need, needs.size(), 0.0f);
  const std::span<const float> inputs = Values(hidden);
  const std::span<const int64_t> token_ids = Values(tokens);
  const py::gil_scoped_release unlocked;
  const size_t row_size = inputs.size() / std::max<size_t>(1, num_tokens * num_sources);
  for (size_t token = 0; token < num_tokens; ++token) {
    predictor.BeginPass(1, 1, token_ids.empty() ? token_ids : token_ids.subspan(token, 1));
    for (size_t source = 0; source < num_sources; ++source) {
      const int32_t layer = static_cast<int32_t>(source) + (has_embeddings ? kTokenStart : 0);
      predictor.Observe(layer, inputs.subspan((token * num_sources + source) * row_size, row_size));
      predictor.Predict(layer);
      for (int32_t distance = 1; distance <= predictor.num_distances(); ++distance) {
        const size_t first =
            ((token * num_sources + source) * num_distances + static_cast<size_t>(distance) - 1) *
            m;
        const std::span<int32_t> ranked(id + first, m);
        predictor.Rank(distance, ranked);
        const std::span<const float> all = predictor.need(distance);
        std::ranges::transform(ranked, need + first,
                               [&](int32_t e) { return all[static_cast<size_t>(e)]; });
      }
      if (layer >= 0) predictor.Learn(layer);
    }
  }
  return {std::move(ids), std::move(needs)};
}

}  // namespace

void DefinePredictor(py::module_& m) {
  m.attr("TOKEN_START") = kTokenStart;
  py::class_<Predictor>(m, "Predictor")
      .def(py::init(&MakePredictor), py::arg("weights"), py::kw_only(), py::arg("biases"),
           py::arg("corrections"), py::arg("top_k"), py::arg("is_sigmoid"), py::arg("num_groups"),
           py::arg("top_groups"), py::arg("max_distance"), py::arg("num_token_buckets"))
      .def(
          "begin_pass",
          [](Predictor& p, int32_t num_sequences, int32_t rows_per_sequence,
             const IdArray& tokens) {
            p.BeginPass(num_sequences, rows_per_sequence, Values(tokens));
          },
          py::arg("num_sequences"), py::arg("rows_per_sequence"), py::arg("tokens"))
      .def("observe", [](Predictor& p, int32_t layer,
                         const FloatArray& hidden) { p.Observe(layer, Values(hidden)); })
      .def("predict", py::overload_cast<int32_t>(&Predictor::Predict),
           py::call_guard<py::gil_scoped_release>())
      .def("predict", py::overload_cast<int32_t, int32_t>(&Predictor::Predict),
           py::call_guard<py::gil_scoped_release>())
      .def("learn", &Predictor::Learn, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_distances", &Predictor::num_distances)
      .def("need", [](const Predictor& p, int32_t distance) { return ToArray(p.need(distance)); })
      .def("scores",
           [](const Predictor& p, int32_t distance) { return ToArray(p.scores(distance)); })
      .def("replay", &Replay, py::arg("hidden"), py::arg("tokens"), py::arg("num_ranked"))
      .def_property_readonly("state", &State);
}

}  // namespace expertflow
