// What the numpy reference in tests/test_predictor.py does not cover: several sequences, the order
// of calls, and what is remembered between passes.

#include "core/predictor/predictor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <span>
#include <stdexcept>
#include <vector>

#include "core/predictor/vector_math.h"

namespace expertflow {
namespace {

using ::testing::ElementsAre;
using ::testing::Pointwise;

constexpr int32_t kNumLayers = 3;
constexpr size_t kNumExperts = 6;
constexpr size_t kHidden = 10;

std::vector<float> RandomFloats(size_t size, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (float& value : values) value = normal(random);
  return values;
}

Predictor MakePredictor() {
  const PredictorConfig config{.num_layers = kNumLayers,
                               .hidden = kHidden,
                               .max_distance = 2,
                               .num_token_buckets = 4,
                               .rule = {.num_experts = kNumExperts, .top_k = 2}};
  return Predictor(config, {RandomFloats(kNumLayers * kNumExperts * kHidden, 1), {}, {}});
}

std::vector<float> ToVector(std::span<const float> values) {
  return {values.begin(), values.end()};
}

// Runs all layers of a pass and returns the need at layer 0 for layer 1. `learn_first` swaps the
// calls that may be swapped.
std::vector<float> RunPass(Predictor& predictor, const std::vector<std::vector<float>>& hidden,
                           bool learn_first = false) {
  std::vector<float> need;
  for (int32_t layer = 0; layer < kNumLayers; ++layer) {
    predictor.Observe(layer, hidden[static_cast<size_t>(layer)]);
    if (learn_first) predictor.Learn(layer);
    predictor.Predict(layer);
    if (layer == 0) need = ToVector(predictor.need(1));
    if (!learn_first) predictor.Learn(layer);
  }
  return need;
}

std::vector<std::vector<float>> RandomPass(size_t num_rows, uint32_t seed) {
  std::vector<std::vector<float>> hidden;
  for (uint32_t layer = 0; layer < kNumLayers; ++layer) {
    hidden.push_back(RandomFloats(num_rows * kHidden, 100 * seed + layer));
  }
  return hidden;
}

TEST(PredictorTest, PredictingAndLearningCommute) {
  Predictor one = MakePredictor(), other = MakePredictor();
  for (uint32_t seed = 0; seed < 20; ++seed) {
    one.BeginPass(1, 1, {});
    other.BeginPass(1, 1, {});
    EXPECT_EQ(RunPass(one, RandomPass(1, seed)), RunPass(other, RandomPass(1, seed), true));
  }
  EXPECT_EQ(one.state().weights, other.state().weights);
}

TEST(PredictorTest, SequencesSideBySideEachHaveTheirOwnPast) {
  // The past is what layer 1 saw of the last token; layer 0 then scores today's with random
  // weights.
  const std::vector<float> past = RandomFloats(2 * kHidden, 11), today = RandomFloats(kHidden, 12);
  const auto scores_after = [&](std::span<const float> seen, int32_t num_sequences) {
    Predictor predictor = MakePredictor();
    predictor.BeginPass(num_sequences, 1, {});
    predictor.Observe(1, seen);
    predictor.Learn(1);
    predictor.state().weights = RandomFloats(predictor.state().weights.size(), 13);
    predictor.state().deviations.assign(kNumLayers, 1.0f);
    predictor.BeginPass(num_sequences, 1, {});
    std::vector<float> rows;
    for (int32_t i = 0; i < num_sequences; ++i) rows.insert(rows.end(), today.begin(), today.end());
    predictor.Observe(0, rows);
    predictor.Predict(0);
    return ToVector(predictor.scores(1));
  };
  const std::vector<float> first = scores_after(std::span(past).first(kHidden), 1);
  const std::vector<float> second = scores_after(std::span(past).last(kHidden), 1);
  EXPECT_NE(first, second);
  std::vector<float> both = first;
  both.insert(both.end(), second.begin(), second.end());
  EXPECT_EQ(scores_after(past, 2), both);
}

TEST(PredictorTest, NeedOfSeveralRowsIsThatSomeRowNeedsIt) {
  Predictor predictor = MakePredictor();
  predictor.BeginPass(1, 2, {});
  predictor.Observe(0, RandomPass(2, 3)[0]);
  predictor.Predict(0);
  const NeedCalibration calibration;
  for (size_t e = 0; e < kNumExperts; ++e) {
    const float first = calibration.Probability(predictor.scores(1)[e]);
    const float second = calibration.Probability(predictor.scores(1)[kNumExperts + e]);
    EXPECT_NEAR(predictor.need(1)[e], 1 - (1 - first) * (1 - second), 1e-6);
  }
}

TEST(PredictorTest, FarLayersThatWereNotScoredTeachNothing) {
  Predictor predictor = MakePredictor();
  predictor.BeginPass(1, 1, {});
  const std::vector<std::vector<float>> hidden = RandomPass(1, 5);
  for (int32_t layer = 0; layer < kNumLayers; ++layer) {
    predictor.Observe(layer, hidden[static_cast<size_t>(layer)]);
    predictor.Predict(layer, 1);
    EXPECT_EQ(predictor.num_distances(), layer + 1 < kNumLayers ? 1 : 0);
    predictor.Learn(layer);
  }
  LearnedState& state = predictor.state();
  EXPECT_THAT(ToVector(state.Weights(state.Pair(0, 1))), ::testing::Contains(::testing::Ne(0.0f)));
  EXPECT_THAT(ToVector(state.Weights(state.Pair(0, 2))), ::testing::Each(0.0f));
}

TEST(PredictorTest, ALayerThatWasNotPredictedTeachesNothing) {
  Predictor predictor = MakePredictor();
  predictor.BeginPass(1, 1, {});
  for (int32_t layer = 0; layer < kNumLayers; ++layer) {
    predictor.Observe(layer, RandomPass(1, 5)[static_cast<size_t>(layer)]);
    predictor.Learn(layer);
  }
  EXPECT_THAT(predictor.state().weights, ::testing::Each(0.0f));
  EXPECT_THAT(predictor.state().num_tokens, ElementsAre(1, 1, 1));
}

TEST(PredictorTest, RanksByNeedAndTiesByTheLowerId) {
  Predictor predictor = MakePredictor();
  predictor.BeginPass(1, 1, {});
  predictor.Observe(0, std::vector<float>(kHidden, 0.0f));  // nothing is known of such a row
  predictor.Predict(0);
  std::vector<int32_t> experts(3);
  predictor.Rank(1, experts);
  EXPECT_THAT(experts, ElementsAre(0, 1, 2));
  experts.resize(kNumExperts + 1);
  EXPECT_THROW(predictor.Rank(1, experts), std::invalid_argument);
  EXPECT_THROW(predictor.need(3), std::out_of_range);
}

TEST(PredictorTest, EmbeddingForeseesTheFirstLayersAndIsNotLearnedFor) {
  Predictor predictor = MakePredictor();
  predictor.BeginPass(1, 1, {});
  predictor.Observe(kTokenStart, RandomFloats(kHidden, 7));
  predictor.Predict(kTokenStart);
  EXPECT_EQ(predictor.num_distances(), 2);
  EXPECT_THROW(predictor.Learn(kTokenStart), std::logic_error);
  predictor.Observe(0, RandomFloats(kHidden, 8));
  predictor.Learn(0);
  const auto learned = [&](int32_t layer, size_t distance) {
    const size_t pair = predictor.state().Pair(layer, distance);
    return std::ranges::any_of(predictor.state().Weights(pair), [](float w) { return w != 0; });
  };
  EXPECT_TRUE(learned(kTokenStart, 1));
  EXPECT_FALSE(learned(kTokenStart, 2)) << "layer 1 has not run";
  predictor.BeginPass(1, 1, {});  // without an embedding
  predictor.Observe(0, RandomFloats(kHidden, 9));
  const std::vector<float> before = predictor.state().weights;
  predictor.Learn(0);
  EXPECT_EQ(predictor.state().weights, before);
}

TEST(PredictorTest, RefusesCallsOutOfOrder) {
  Predictor predictor = MakePredictor();
  const std::vector<float> row(kHidden, 1.0f);
  EXPECT_THROW(predictor.Observe(0, row), std::invalid_argument);  // no pass
  EXPECT_THROW(predictor.BeginPass(0, 1, {}), std::invalid_argument);
  EXPECT_THROW(predictor.BeginPass(1, 1, std::vector<int64_t>{-1}), std::invalid_argument);
  predictor.BeginPass(1, 1, {});
  EXPECT_THROW(predictor.Predict(0), std::logic_error);
  predictor.Observe(0, row);
  predictor.Predict(0);
  predictor.BeginPass(1, 1, {});
  EXPECT_THROW(predictor.Learn(0), std::logic_error);
  EXPECT_THROW(predictor.Observe(kNumLayers, row), std::out_of_range);
}

TEST(VectorMathTest, AgreesWithPlainLoopsForEverySize) {
  for (const size_t columns : {1u, 15u, 16u, 31u, 32u, 33u, 64u, 100u}) {
    const size_t stride = columns + 3;
    std::vector<float> matrix = RandomFloats(4 * stride, 1);
    const std::vector<float> x = RandomFloats(columns, 2), scale = RandomFloats(4, 3);
    std::vector<float> product(4), expected(4, 0.0f), updated = matrix;
    MatrixVector(matrix.data(), 4, stride, x.data(), columns, product.data());
    AddOuterProduct(updated.data(), 4, stride, scale.data(), x.data(), columns);
    for (size_t row = 0; row < 4; ++row) {
      for (size_t i = 0; i < columns; ++i) {
        expected[row] += matrix[row * stride + i] * x[i];
        matrix[row * stride + i] += scale[row] * x[i];
      }
    }
    EXPECT_THAT(product, Pointwise(::testing::FloatNear(1e-4f), expected));
    EXPECT_THAT(updated, Pointwise(::testing::FloatNear(1e-5f), matrix));
  }
}

}  // namespace
}  // namespace expertflow
