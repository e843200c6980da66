#include "core/simulation/transition_predictor.h"

#include <gtest/gtest.h>

#include <vector>

#include "trace_fixture.h"

namespace expertflow {
namespace {

constexpr int32_t kMaxDistance = 3;

std::vector<Prediction> PredictAfter(const TestTrace& trace, int64_t num_steps) {
  TransitionPredictor predictor(trace.view(), kMaxDistance);
  std::vector<Prediction> predictions;
  for (int64_t step = 0; step < num_steps; ++step) {
    predictor.Learn(step);
    predictions.clear();
    predictor.Predict(step, kMaxDistance, predictions);
  }
  return predictions;
}

TEST(TransitionPredictorTest, LearnsWhatFollowsAlsoOverTheEndOfAToken) {
  // Expert e of layer 0 is always followed by e + 1 in layer 1, and that by e in the next token.
  TestTrace trace{2, 1, 4, {}};
  for (uint32_t token = 0; token < 1000; ++token) {
    const auto expert = static_cast<uint16_t>(token / 2 % 3);
    trace.expert_ids.insert(trace.expert_ids.end(), {expert, static_cast<uint16_t>(expert + 1)});
  }
  // After layer 0 of token 900, whose expert is 0 for the first time.
  const std::vector<Prediction> predictions = PredictAfter(trace, 2 * 900 + 1);
  ASSERT_EQ(predictions.size(), 2 * kMaxDistance);  // twice the top-k of each
  EXPECT_EQ(predictions[0].distance, 1);
  EXPECT_EQ(predictions[0].expert, 1);
  EXPECT_GT(predictions[0].need, 0.95F);
  EXPECT_LT(predictions[1].need, 0.05F);
}

TEST(TransitionPredictorTest, NeedIsHowOftenItComesTrue) {
  const TestTrace trace = SkewedTrace(4000, 3, 2, 16, 21);
  TransitionPredictor predictor(trace.view(), kMaxDistance);
  double promised = 0.0;
  double kept = 0.0;
  std::vector<Prediction> predictions;
  for (int64_t step = 0; step + kMaxDistance < trace.view().num_steps(); ++step) {
    predictor.Learn(step);
    predictions.clear();
    predictor.Predict(step, kMaxDistance, predictions);
    for (const Prediction& p : predictions) {
      if (step < 3000) break;
      promised += static_cast<double>(p.need);
      for (const uint16_t expert : trace.view().experts(step + p.distance)) {
        kept += expert == p.expert;
      }
    }
  }
  EXPECT_NEAR(promised / kept, 1.0, 0.05);
}

}  // namespace
}  // namespace expertflow
