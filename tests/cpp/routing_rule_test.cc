#include "core/predictor/routing_rule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>
#include <vector>

namespace expertflow {
namespace {

using ::testing::ElementsAre;
using ::testing::FloatEq;
using ::testing::FloatNear;
using ::testing::Lt;

float Logit(float probability) { return std::log(probability / (1.0f - probability)); }

TEST(RoutingRuleTest, MarginsOfSoftmaxAreLogitsAboveTheBorder) {
  Router router({.num_experts = 4, .top_k = 2});
  std::vector<float> values = {1.0f, 4.0f, 2.0f, -3.0f};
  const float deviation = router.ToMargins(values, {});
  EXPECT_THAT(values, ElementsAre(FloatEq(-0.5f), FloatEq(2.5f), FloatEq(0.5f), FloatEq(-4.5f)));
  EXPECT_NEAR(deviation, std::sqrt(6.5), 1e-6);
}

TEST(RoutingRuleTest, TheCorrectionBiasDecidesBetweenSigmoids) {
  Router router({.num_experts = 3, .top_k = 1, .is_sigmoid = true});
  std::vector<float> values = {Logit(0.9f), Logit(0.6f), Logit(0.1f)};
  router.ToMargins(values, std::vector<float>{0.0f, 0.5f, 0.0f});
  EXPECT_THAT(values, ElementsAre(FloatNear(-0.1f, 1e-6f), FloatNear(0.1f, 1e-6f),
                                  FloatNear(-0.9f, 1e-6f)));
}

TEST(RoutingRuleTest, ExpertsOutsideTheChosenGroupsAreBelowTheBorder) {
  // Groups of three. Sigmoid families choose by the sum of a group's two best: the second group.
  const std::vector<float> scores = {0.9f, 0.1f, 0.1f, 0.6f, 0.5f, 0.2f};
  std::vector<float> values;
  for (const float score : scores) values.push_back(Logit(score));
  Router sums({.num_experts = 6, .top_k = 2, .is_sigmoid = true, .num_groups = 2, .top_groups = 1});
  sums.ToMargins(values, {});
  EXPECT_THAT(values, ElementsAre(Lt(0.0f), Lt(0.0f), Lt(0.0f), FloatNear(0.25f, 1e-6f),
                                  FloatNear(0.15f, 1e-6f), FloatNear(-0.15f, 1e-6f)));
  // Softmax families choose by the best: the first group.
  Router maxima({.num_experts = 6, .top_k = 1, .num_groups = 2, .top_groups = 1});
  values = scores;
  maxima.ToMargins(values, {});
  EXPECT_THAT(values, ElementsAre(FloatNear(0.4f, 1e-6f), FloatNear(-0.4f, 1e-6f),
                                  FloatNear(-0.4f, 1e-6f), Lt(0.0f), Lt(0.0f), Lt(0.0f)));
}

TEST(RoutingRuleTest, AllExpertsOfTheChosenGroupsMayBeRouted) {
  Router router({.num_experts = 4, .top_k = 2, .num_groups = 2, .top_groups = 1});
  std::vector<float> values = {1.0f, 0.0f, 3.0f, 2.0f};
  const float deviation = router.ToMargins(values, {});
  EXPECT_THAT(values,
              ElementsAre(Lt(0.0f), Lt(0.0f), FloatEq(1.0f + deviation), FloatEq(deviation)));
}

TEST(RoutingRuleTest, RefusesWhatMakesNoSense) {
  EXPECT_THROW(Router({.num_experts = 4, .top_k = 5}), std::invalid_argument);
  EXPECT_THROW(Router({.num_experts = 4, .top_k = 0}), std::invalid_argument);
  EXPECT_THROW(Router({.num_experts = 4, .top_k = 1, .num_groups = 3}), std::invalid_argument);
  EXPECT_THROW(Router({.num_experts = 4, .top_k = 1, .num_groups = 2, .top_groups = 3}),
               std::invalid_argument);
  EXPECT_THROW(Router({.num_experts = 4, .top_k = 3, .num_groups = 2, .top_groups = 1}),
               std::invalid_argument);
}

}  // namespace
}  // namespace expertflow
