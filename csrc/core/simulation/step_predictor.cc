#include "core/simulation/step_predictor.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>

namespace expertflow {
namespace {

// Row `row` of [rows, distances, candidates].
void Append(const RecordedPredictions& recorded, const uint16_t* ids, const uint16_t* need_q16,
            int64_t row, int32_t max_distance, std::vector<Prediction>& out) {
  auto i = static_cast<size_t>(row) *
           static_cast<size_t>(recorded.num_distances * recorded.num_candidates);
  for (int32_t d = 1; d <= std::min(max_distance, recorded.num_distances); ++d) {
    for (int32_t c = 0; c < recorded.num_candidates; ++c, ++i) {
      const float need = static_cast<float>(need_q16[i]) * (1.0F / 65535.0F);
      if (need > 0.0F) out.push_back({d, ids[i], need});
    }
  }
}

}  // namespace

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
  Append(recorded, recorded.expert_ids, recorded.need_q16, step,
         std::min(max_distance, layers_left), out);
}

void RecordedPredictor::PredictToken(int64_t step, int32_t max_distance,
                                     std::vector<Prediction>& out) {
  const RecordedPredictions& recorded = trace_.predictions;
  if (recorded.first_expert_ids == nullptr) return;
  Append(recorded, recorded.first_expert_ids, recorded.first_need_q16, trace_.TokenOf(step),
         std::min(max_distance, trace_.num_layers), out);
}

}  // namespace expertflow
