#include "core/trace.h"

#include <stdexcept>
#include <string>

namespace expertflow {
namespace {

// `ids` [steps, ids_per_step].
void CheckIds(const TraceView& trace, const char* array, const uint16_t* ids, size_t ids_per_step) {
  const size_t num_ids = static_cast<size_t>(trace.num_steps()) * ids_per_step;
  for (size_t i = 0; i < num_ids; ++i) {
    if (ids[i] < trace.num_experts) continue;
    const auto step = static_cast<int64_t>(i / ids_per_step);
    throw std::invalid_argument(
        std::string(array) + " of token " + std::to_string(step / trace.num_layers) + ", layer " +
        std::to_string(trace.LayerOf(step)) + ", position " + std::to_string(i % ids_per_step) +
        " is " + std::to_string(ids[i]) + ", but a layer has " + std::to_string(trace.num_experts) +
        " experts");
  }
}

}  // namespace

void CheckTrace(const TraceView& trace) {
  if (trace.num_tokens <= 0 || trace.num_layers <= 0 || trace.top_k <= 0 ||
      trace.num_experts <= 0) {
    throw std::invalid_argument("a trace needs tokens, layers, a top-k and experts");
  }
  CheckIds(trace, "expert_ids", trace.expert_ids, static_cast<size_t>(trace.top_k));
  const RecordedPredictions& recorded = trace.predictions;
  if (recorded.num_distances > 0) {
    CheckIds(trace, "predicted_ids", recorded.expert_ids,
             static_cast<size_t>(recorded.num_distances * recorded.num_candidates));
  }
}

}  // namespace expertflow
