#include "core/trace.h"

#include <stdexcept>
#include <string>

namespace expertflow {
namespace {

// `ids` [tokens * rows_per_token, ids_per_row], a row a layer, or one a token.
void CheckIds(const TraceView& trace, const char* array, const uint16_t* ids,
              int32_t rows_per_token, size_t ids_per_row) {
  const size_t num_ids = static_cast<size_t>(trace.num_tokens * rows_per_token) * ids_per_row;
  for (size_t i = 0; i < num_ids; ++i) {
    if (ids[i] < trace.num_experts) continue;
    const auto row = static_cast<int64_t>(i / ids_per_row);
    const std::string layer =
        rows_per_token > 1 ? ", layer " + std::to_string(row % rows_per_token) : "";
    throw std::invalid_argument(
        std::string(array) + " of token " + std::to_string(row / rows_per_token) + layer +
        ", position " + std::to_string(i % ids_per_row) + " is " + std::to_string(ids[i]) +
        ", but a layer has " + std::to_string(trace.num_experts) + " experts");
  }
}

}  // namespace

void CheckTrace(const TraceView& trace) {
  if (trace.num_tokens <= 0 || trace.num_layers <= 0 || trace.top_k <= 0 ||
      trace.num_experts <= 0) {
    throw std::invalid_argument("a trace needs tokens, layers, a top-k and experts");
  }
  CheckIds(trace, "expert_ids", trace.expert_ids, trace.num_layers,
           static_cast<size_t>(trace.top_k));
  const RecordedPredictions& recorded = trace.predictions;
  if (recorded.num_distances > 0) {
    const auto per_row = static_cast<size_t>(recorded.num_distances * recorded.num_candidates);
    CheckIds(trace, "predicted_ids", recorded.expert_ids, trace.num_layers, per_row);
    if (recorded.first_expert_ids != nullptr) {
      CheckIds(trace, "first_predicted_ids", recorded.first_expert_ids, 1, per_row);
    }
  }
}

}  // namespace expertflow
