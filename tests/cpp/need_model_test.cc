#include "core/eviction/need_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "allocation_counter.h"

namespace expertflow {
namespace {

using Experts = std::vector<int32_t>;

constexpr int32_t kOne = 1 << NeedModel::kFractionBits;

// The rules said once more, with maps and the whole history.
class ReferenceNeedModel {
 public:
  ReferenceNeedModel(int32_t num_layers, int32_t num_experts, int32_t top_k, int32_t window)
      : num_layers_(num_layers), num_experts_(num_experts), top_k_(top_k), window_(window) {}

  void Observe(int32_t layer, const Experts& experts) {
    std::vector<Step>& steps = steps_of_[layer];
    steps.push_back({.experts = experts, .sources = {}, .probabilities = {}});
    Step& now = steps.back();
    now.sources = {{layer, steps.size(), experts}, {layer, steps.size() - 1, {}}};
    if (steps.size() > 1) now.sources[1].experts = steps[steps.size() - 2].experts;
    for (int32_t back = 1; back <= NeedModel::kLayersBack; ++back) {
      const int32_t source = ((layer - back) % num_layers_ + num_layers_) % num_layers_;
      const std::vector<Step>& others = steps_of_[source];
      now.sources.push_back(
          {source, others.size(), others.empty() ? Experts{} : others.back().experts});
    }
    for (int32_t e = 0; e < num_experts_; ++e) {
      int32_t& frequency = frequency_[{layer, e}];
      frequency += (std::ranges::find(experts, e) != experts.end() ? kOne / 8 : 0) -
                   FloorDivide(frequency, 8);
    }
    const auto window = static_cast<size_t>(window_);
    Score(layer, now);
    if (steps.size() > window) Learn(layer, steps.size() - 1 - window);
  }

  int32_t score(int32_t layer, int32_t expert) { return score_[{layer, expert}]; }

 private:
  struct Source {
    int32_t layer;
    size_t num_steps;  // of the layer, up to and including this one
    Experts experts;
  };
  struct Step {
    Experts experts;
    std::vector<Source> sources;
    std::vector<int32_t> probabilities;
  };
  using WeightId = std::tuple<int32_t, size_t, int32_t, int32_t>;  // layer, source, routed, expert

  static int32_t FloorDivide(int32_t a, int32_t b) {
    return static_cast<int32_t>(std::floor(static_cast<double>(a) / b));
  }

  void Learn(int32_t layer, size_t past) {
    const std::vector<Step>& steps = steps_of_[layer];
    for (int32_t e = 0; e < num_experts_; ++e) {
      int32_t label = 0;
      for (int32_t distance = window_; distance >= 1; --distance) {
        const Experts& used = steps[past + static_cast<size_t>(distance)].experts;
        if (std::ranges::find(used, e) == used.end()) continue;
        label = (window_ - distance + 1) * 32767 / window_;
      }
      const int32_t error = label - steps[past].probabilities[static_cast<size_t>(e)];
      const int32_t gradient = FloorDivide(error * (kOne / 128) + (1 << 14), 1 << 15);
      for (size_t s = 0; s < steps[past].sources.size(); ++s) {
        const Source& source = steps[past].sources[s];
        if (steps_of_[source.layer].size() - source.num_steps >= num_steps_kept_) continue;
        for (const int32_t routed : source.experts) {
          int32_t& weight = weights_[{layer, s, routed, e}];
          weight = std::clamp(weight + gradient, -2047, 2047);
        }
      }
    }
  }

  void Score(int32_t layer, Step& now) {
    int32_t num_inputs = 0;
    for (const Source& source : now.sources) {
      num_inputs += static_cast<int32_t>(source.experts.size());
    }
    const int32_t nominal = NeedModel::kNumSources * top_k_;
    for (int32_t e = 0; e < num_experts_; ++e) {
      int32_t logit = 0;
      for (size_t s = 0; s < now.sources.size(); ++s) {
        for (const int32_t routed : now.sources[s].experts) {
          logit += weights_[{layer, s, routed, e}];
        }
      }
      if (num_inputs > nominal) logit = logit * nominal / num_inputs;
      logit += 2 * frequency_[{layer, e}];
      const double middle = (std::clamp(FloorDivide(logit, kOne / 32), -256, 255) + 0.5) / 32;
      now.probabilities.push_back(
          static_cast<int32_t>(std::lround(32767 / (1.0 + std::exp(-middle)))));
      int32_t& score = score_[{layer, e}];
      score = logit + FloorDivide(score * 5, 16);
    }
  }

  int32_t num_layers_;
  int32_t num_experts_;
  int32_t top_k_;
  int32_t window_;
  size_t num_steps_kept_ = std::bit_ceil(static_cast<size_t>(window_) + 2);
  std::map<int32_t, std::vector<Step>> steps_of_;
  std::map<std::pair<int32_t, int32_t>, int32_t> frequency_;
  std::map<std::pair<int32_t, int32_t>, int32_t> score_;
  std::map<WeightId, int32_t> weights_;
};

int32_t Draw(std::mt19937& random, int32_t lowest, int32_t highest) {
  return std::uniform_int_distribution<int32_t>(lowest, highest)(random);
}

// Also batches, layers out of turn and layers that rest for longer than the model remembers.
TEST(NeedModelTest, ScoresAsTheReferenceDoes) {
  for (uint32_t seed = 0; seed < 30 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    const int32_t num_layers = Draw(random, 1, 5);
    const int32_t num_experts = Draw(random, 2, 40);
    const int32_t top_k = Draw(random, 1, std::min(num_experts, 4));
    const int32_t num_slots = Draw(random, 1, num_layers * num_experts);
    NeedModel model(num_layers, num_experts, top_k, num_slots);
    ReferenceNeedModel reference(num_layers, num_experts, top_k, model.window());
    for (int i = 0; i < 400 && !HasFailure(); ++i) {
      const int32_t layer = Draw(random, 0, 4) ? i % num_layers : Draw(random, 0, num_layers - 1);
      const int32_t num_routed = Draw(random, 0, 9) ? top_k : Draw(random, 0, num_experts);
      Experts experts;
      while (std::ssize(experts) < num_routed) {
        const int32_t e = Draw(random, 0, num_experts - 1) * Draw(random, 0, 2) / 2;
        if (std::ranges::find(experts, e) == experts.end()) experts.push_back(e);
        if (std::ssize(experts) < num_routed && Draw(random, 0, 50) == 0) break;
      }
      const int64_t num_allocations_before = num_allocations;
      model.Observe(layer, experts);
      EXPECT_EQ(num_allocations, num_allocations_before) << "observing must not allocate";
      reference.Observe(layer, experts);
      for (int32_t l = 0; l < num_layers; ++l) {
        for (int32_t e = 0; e < num_experts; ++e) {
          ASSERT_EQ(model.scores(l)[e], reference.score(l, e))
              << "step " << i << ", layer " << l << ", expert " << e;
        }
      }
    }
  }
}

TEST(NeedModelTest, TheWindowFollowsTheCache) {
  const auto window = [](int32_t num_slots, int32_t top_k) {
    return NeedModel(24, 32, top_k, num_slots).window();
  };
  EXPECT_EQ(window(24 * 8, 4), 6);
  EXPECT_EQ(window(24 * 16, 4), 12);
  EXPECT_EQ(window(24 * 16 + 23, 4), 12) << "whole slots of a layer";
  EXPECT_EQ(window(4, 4), 2) << "the smallest cache that all layers share";
  EXPECT_EQ(window(24 * 32, 2), NeedModel::kMaxWindow);
}

// Expert 0 calls expert 4 two tokens later, whoever comes between; frequencies are all alike.
TEST(NeedModelTest, LearnsWhoFollowsWhom) {
  constexpr int32_t kNumExperts = 8;
  NeedModel model(1, kNumExperts, 1, 2);
  ASSERT_EQ(model.window(), 6);
  std::mt19937 random(1);
  const auto observe_block = [&] {
    Experts others = {1, 2, 3, 5, 6, 7};
    std::ranges::shuffle(others, random);
    for (size_t i = 0; i < others.size(); ++i) {
      if (i == 2) model.Observe(0, Experts{0});
      if (i == 3) model.Observe(0, Experts{4});
      model.Observe(0, Experts{others[i]});
    }
  };
  for (int block = 0; block < 500; ++block) observe_block();
  for (const int32_t e : {1, 2, 3, 0}) model.Observe(0, Experts{e});
  const std::span scores(model.scores(0), size_t{kNumExperts});
  EXPECT_EQ(std::ranges::max_element(scores) - scores.begin(), 4);
}

TEST(NeedModelTest, LearnsFromTheLayersBefore) {
  constexpr int32_t kNumExperts = 16;
  NeedModel model(4, kNumExperts, 1, 16);
  std::mt19937 random(1);
  int32_t called = 0;
  const auto observe_token = [&] {
    const int32_t caller = Draw(random, 0, kNumExperts - 1);
    for (int32_t layer = 0; layer < 3; ++layer) model.Observe(layer, Experts{caller});
    model.Observe(3, Experts{called});  // by the token before
    called = (caller * 5 + 3) % kNumExperts;
  };
  for (int token = 0; token < 4000; ++token) observe_token();
  int num_right = 0;
  for (int token = 0; token < 100; ++token) {
    observe_token();
    const int32_t* scores = model.scores(3);
    num_right += std::max_element(scores, scores + kNumExperts) - scores == called;
  }
  EXPECT_GT(num_right, 90);
}

}  // namespace
}  // namespace expertflow
