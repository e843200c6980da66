#pragma once

#include <cstdint>
#include <vector>

#include "core/prefetch_scheduler.h"
#include "core/trace.h"

namespace expertflow {

// Foresees the routing of a trace, one step after the other.
class StepPredictor {
 public:
  virtual ~StepPredictor() = default;

  // Appends which experts the steps up to `max_distance` after `step` may need: nearer steps first,
  // the more probable expert first. Called after Learn(step).
  virtual void Predict(int64_t step, int32_t max_distance, std::vector<Prediction>& out) = 0;

  // The same for the steps of the token that begins now, `step` being its first one, whose distance
  // is 1. Called before Learn(step). A predictor that knew it before appends nothing.
  virtual void PredictToken(int64_t, int32_t, std::vector<Prediction>&) {}

  // The routing of `step`, which is the one after the last, is known now.
  virtual void Learn(int64_t) {}
};

// Knows the trace: the perfect predictor.
class OraclePredictor : public StepPredictor {
 public:
  explicit OraclePredictor(const TraceView& trace) : trace_(trace) {}
  void Predict(int64_t step, int32_t max_distance, std::vector<Prediction>& out) override;

 private:
  TraceView trace_;
};

// What a predictor foresaw when the trace was recorded.
class RecordedPredictor : public StepPredictor {
 public:
  // Throws std::invalid_argument if the trace holds no predictions.
  explicit RecordedPredictor(const TraceView& trace);
  void Predict(int64_t step, int32_t max_distance, std::vector<Prediction>& out) override;
  void PredictToken(int64_t step, int32_t max_distance, std::vector<Prediction>& out) override;

 private:
  TraceView trace_;
};

}  // namespace expertflow
