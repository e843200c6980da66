#include "core/simulation/ids_predictor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "trace_fixture.h"

namespace expertflow {
namespace {

constexpr int32_t kMaxDistance = 3;

// Visits every step after the first `num_warmup_steps` that has a step kMaxDistance behind it, with
// what is foreseen there.
template <class Visit>
void ForEachForeseen(const TestTrace& trace, int64_t num_warmup_steps, Visit&& visit) {
  IdsPredictor predictor(trace.view(), kMaxDistance);
  std::vector<Prediction> predictions;
  for (int64_t step = 0; step + kMaxDistance < trace.view().num_steps(); ++step) {
    predictor.Learn(step);
    predictions.clear();
    predictor.Predict(step, kMaxDistance, predictions);
    if (step >= num_warmup_steps) visit(step, predictions);
  }
}

bool Needs(const TestTrace& trace, int64_t step, int32_t expert) {
  return std::ranges::count(trace.view().experts(step), expert) > 0;
}

// Tokens of 40 kinds, at random; each kind has its own experts at every layer, and layer 0 alone
// does not tell them apart.
TestTrace KindsOfTokens(int64_t num_tokens) {
  constexpr int32_t kLayers = 6, kTopK = 2, kExperts = 16, kKinds = 40;
  std::mt19937 random(7);
  std::vector<std::vector<uint16_t>> kinds(kKinds);
  for (auto& ids : kinds) {
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      const auto first = static_cast<uint16_t>(random() % kExperts);
      ids.push_back(first);
      ids.push_back(static_cast<uint16_t>((first + 1 + random() % (kExperts - 1)) % kExperts));
    }
  }
  TestTrace trace{kLayers, kTopK, kExperts, {}};
  for (int64_t token = 0; token < num_tokens; ++token) {
    const auto& ids = kinds[random() % kKinds];
    trace.expert_ids.insert(trace.expert_ids.end(), ids.begin(), ids.end());
  }
  return trace;
}

TEST(IdsPredictorTest, LearnsWhatFollowsAlsoOverTheEndOfAToken) {
  // Expert e of layer 0 is always followed by e + 1 in layer 1, and that by e in the next token.
  TestTrace trace{2, 1, 4, {}};
  for (uint32_t token = 0; token < 1000; ++token) {
    const auto expert = static_cast<uint16_t>(token / 2 % 3);
    trace.expert_ids.insert(trace.expert_ids.end(), {expert, static_cast<uint16_t>(expert + 1)});
  }
  ForEachForeseen(trace, 2 * 900, [&](int64_t step, const std::vector<Prediction>& predictions) {
    ASSERT_EQ(predictions.front().distance, 1);
    EXPECT_TRUE(Needs(trace, step + 1, predictions.front().expert));
    EXPECT_GT(predictions.front().need, 0.9F);
  });
}

TEST(IdsPredictorTest, RecognisesTokensThatFrequencyCannotTellApart) {
  const TestTrace trace = KindsOfTokens(2500);
  // The most used experts of each layer, counted over the whole trace: the best frequency can do.
  std::vector<std::vector<int32_t>> uses(6, std::vector<int32_t>(16));
  for (int64_t step = 0; step < trace.view().num_steps(); ++step) {
    auto& layer = uses[static_cast<size_t>(trace.view().LayerOf(step))];
    const auto experts = trace.view().experts(step);  // in the loop, newer compilers warn of it
    for (const uint16_t expert : experts) ++layer[expert];
  }
  int64_t num_found = 0, num_most_used = 0, num_needed = 0;
  ForEachForeseen(trace, 6 * 500, [&](int64_t step, const std::vector<Prediction>& predictions) {
    if (trace.view().LayerOf(step) != 2) return;
    for (int32_t d = 1; d <= kMaxDistance; ++d) {
      auto best = std::ranges::find(predictions, d, &Prediction::distance);
      for (const auto end = best + 2; best != end; ++best) {
        num_found += Needs(trace, step + d, best->expert);
        ++num_needed;
      }
      auto layer = uses[static_cast<size_t>(trace.view().LayerOf(step + d))];
      for (int32_t rank = 0; rank < 2; ++rank) {
        const auto most = std::ranges::max_element(layer);
        num_most_used += Needs(trace, step + d, static_cast<int32_t>(most - layer.begin()));
        *most = 0;
      }
    }
  });
  // Three layers tell nearly all kinds apart.
  EXPECT_GT(static_cast<double>(num_found), 0.97 * static_cast<double>(num_needed));
  EXPECT_LT(static_cast<double>(num_most_used), 0.5 * static_cast<double>(num_needed));
}

TEST(IdsPredictorTest, NeedIsHowOftenItComesTrue) {
  const TestTrace trace = SkewedTrace(4000, 3, 2, 16, 21);
  double promised = 0.0, kept = 0.0, promised_doubtful = 0.0, kept_doubtful = 0.0;
  ForEachForeseen(trace, 3000, [&](int64_t step, const std::vector<Prediction>& predictions) {
    for (const Prediction& p : predictions) {
      const bool needed = Needs(trace, step + p.distance, p.expert);
      promised += static_cast<double>(p.need);
      kept += needed;
      if (p.need > 0.2F) continue;
      promised_doubtful += static_cast<double>(p.need);
      kept_doubtful += needed;
    }
  });
  EXPECT_NEAR(promised / kept, 1.0, 0.05);
  EXPECT_NEAR(promised_doubtful / kept_doubtful, 1.0, 0.15);
}

TEST(IdsPredictorTest, NearerStepsAndMoreProbableExpertsComeFirst) {
  const TestTrace trace = SkewedTrace(300, 3, 2, 16, 5);
  ForEachForeseen(trace, 0, [](int64_t, const std::vector<Prediction>& predictions) {
    EXPECT_TRUE(std::ranges::is_sorted(predictions, [](const Prediction& a, const Prediction& b) {
      return a.distance != b.distance ? a.distance < b.distance : a.need > b.need;
    }));
    for (int32_t d = 1; d <= kMaxDistance; ++d) {
      EXPECT_GE(std::ranges::count(predictions, d, &Prediction::distance), 2);  // top-k
    }
  });
}

}  // namespace
}  // namespace expertflow
