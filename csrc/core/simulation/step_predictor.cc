#include "core/simulation/step_predictor.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>

namespace expertflow {

void OraclePredictor::Predict(int64_t step, int32_t max_distance, std::vector<Prediction>& out) {
  for (int32_t d = 1; d <= max_distance && step + d < trace_.num_steps(); ++d) {
    for (const uint16_t expert : trace_.experts(step + d)) out.push_back({d, expert, 1.0F});
  }
}

RecordedPredictor::RecordedPredictor(const TraceView& trace) : trace_(trace) {
  if (trace.predictions.num_distances <= 0) {
    throw std::invalid_argument("the trace holds no predictions");
  }
}

void RecordedPredictor::Predict(int64_t step, int32_t max_distance, std::vector<Prediction>& out) {
  const RecordedPredictions& recorded = trace_.predictions;
  const int32_t layers_left = trace_.num_layers - 1 - trace_.LayerOf(step);
  const int32_t farthest = std::min({max_distance, recorded.num_distances, layers_left});
  auto i = static_cast<size_t>(step) *
           static_cast<size_t>(recorded.num_distances * recorded.num_candidates);
  for (int32_t d = 1; d <= farthest; ++d) {
    for (int32_t c = 0; c < recorded.num_candidates; ++c, ++i) {
      const float need = static_cast<float>(recorded.need_q16[i]) * (1.0F / 65535.0F);
      if (need > 0.0F) out.push_back({d, recorded.expert_ids[i], need});
    }
  }
}

}  // namespace expertflow
