#pragma once

namespace expertflow {

// Platt scaling, learned online: the probability that an expert is routed is
// sigmoid(slope * score + offset). Newton steps with a running mean of the Hessian, so there is no
// step size to tune. Plain floats, because arrays of these are saved as they are.
struct NeedCalibration {
  float slope = 1.0f;
  float offset = 0.0f;
  float curvature_slope = 0.0f;  // the mean Hessian of the log loss: [slope, both; both, offset]
  float curvature_both = 0.0f;
  float curvature_offset = 0.0f;
  float num_tokens = 0.0f;

  float Probability(float score) const;
};

// Sums over the experts of one token, from which the calibration learns.
class CalibrationStep {
 public:
  void Add(const NeedCalibration& calibration, float score, bool was_routed);
  void Apply(NeedCalibration& calibration) const;

 private:
  float gradient_slope_ = 0.0f, gradient_offset_ = 0.0f;
  float curvature_slope_ = 0.0f, curvature_both_ = 0.0f, curvature_offset_ = 0.0f;
};

}  // namespace expertflow
