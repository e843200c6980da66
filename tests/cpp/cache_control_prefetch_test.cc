// The adaptive prefetching of a cache, under a clock and a link of the test's own.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/cache_control.h"

namespace expertflow {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::SizeIs;

constexpr int32_t kLayers = 6;
constexpr int32_t kExperts = 8;
constexpr int32_t kTopK = 2;
constexpr size_t kExpertBytes = 4096;
constexpr double kLayerUs = 100.0;
constexpr double kFast = 1.25;  // experts that the link brings in a layer's time

ExpertCacheOptions Options(int32_t num_slots, PolicyKind policy = PolicyKind::kLru) {
  return {.num_layers = kLayers,
          .num_experts = kExperts,
          .num_slots = num_slots,
          .planner = {.top_k = kTopK, .expert_bytes = kExpertBytes, .policy = policy},
          .chunk_bytes = kExpertBytes};
}

class CacheControlPrefetchTest : public testing::Test {
 protected:
  void MakeControl(const ExpertCacheOptions& options) { control_.emplace(options, 2); }

  // Plans a layer, brings everything that was posted, and returns the horizon.
  int32_t RunLayer(int32_t layer, std::vector<int64_t> ids, int32_t num_tokens = 1) {
    now_us_ += kLayerUs;
    EXPECT_NE(control_->BeginLayer(layer, ids, num_tokens, now_us_), nullptr);
    BringAll();
    return control_->BeginPrefetch(experts_per_layer_ * kExpertBytes / kLayerUs * 1e6);
  }

  // All layers, `tokens` times, each with experts 0 and 1.
  int32_t RunTokens(int32_t tokens) {
    int32_t horizon = 0;
    for (int32_t i = 0; i < tokens * kLayers; ++i) horizon = RunLayer(i % kLayers, {0, 1});
    return horizon;
  }

  // Eight experts of each layer in turn, which no LRU of four keeps, foreseen one layer ahead.
  void RunForeseenToken(int32_t token) {
    const int32_t first = 2 * token % kExperts;
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      RunLayer(layer, {first, first + 1});
      const int32_t next = layer + 1 < kLayers ? first : (first + 2) % kExperts;
      const auto posted = Prefetch({{{next, 1.0F}, {next + 1, 1.0F}}});
      EXPECT_TRUE(posted.empty() || control_->horizon() > 0);
    }
  }

  // Until prefetching has been found to pay.
  void EarnPrefetching() {
    for (int32_t token = 0; token < 20 && control_->horizon() == 0; ++token) {
      RunForeseenToken(token);
    }
    ASSERT_GT(control_->horizon(), 0);
  }

  using Rows = std::vector<std::vector<std::pair<int, float>>>;

  // Prefetches by rows of {expert, need}, and returns which experts were posted, in order.
  std::vector<ExpertId> Prefetch(const Rows& rows) {
    const int32_t num_posted = PostOnly(rows);
    std::vector<ExpertId> posted = BringAll();
    EXPECT_THAT(posted, SizeIs(num_posted));
    return posted;
  }

  // The same, but they wait.
  int32_t PostOnly(const Rows& rows) {
    std::vector<float> need(rows.size() * kExperts);
    for (size_t row = 0; row < rows.size(); ++row) {
      for (const auto& [expert, p] : rows[row]) {
        need[row * kExperts + static_cast<size_t>(expert)] = p;
      }
    }
    return control_->PrefetchPredicted(need);
  }

  std::vector<ExpertId> BringAll() {
    std::vector<ExpertId> brought;
    while (const std::optional<Chunk> chunk = control_->NextChunk()) {
      brought.push_back(ToId(control_->table(), chunk->expert));
      control_->FinishChunk(*chunk, std::nullopt);
    }
    return brought;
  }

  bool IsResident(ExpertId id) const {
    const SlotTableView& table = control_->table();
    return table.expert_slot[Index(ToIndex(table, id))] != SlotId::kNone;
  }

  std::optional<CacheControl> control_;
  double now_us_ = 0.0;
  double experts_per_layer_ = kFast;
};

TEST_F(CacheControlPrefetchTest, PrefetchesNothingBeforeItHasMeasured) {
  MakeControl(Options(24));
  EXPECT_EQ(control_->BeginPrefetch(1e9), 0) << "no plan yet";
  EXPECT_EQ(RunLayer(0, {0, 1}), 0) << "no compute time yet";
  experts_per_layer_ = 0.0;
  EXPECT_EQ(RunLayer(1, {0, 1}), 0) << "no bandwidth yet";
  EXPECT_THAT(Prefetch({{{3, 1.0F}}}), IsEmpty());
  experts_per_layer_ = kFast;
  EXPECT_GT(RunLayer(2, {0, 1}), 0) << "for the trial";
  EXPECT_THAT(Prefetch({{{3, 1.0F}}}), IsEmpty());
}

TEST_F(CacheControlPrefetchTest, PostsWhatIsWorthItNearerLayersFirst) {
  MakeControl(Options(2 * kLayers));
  EarnPrefetching();
  ASSERT_EQ(RunTokens(4), 2);  // layer 5 was planned: layers 0 and 1 of the next token follow
  control_->ResetStatistics();
  // A need of 0.02 is below the lowest price; only half of a third expert fits before its layer.
  const auto posted = Prefetch({{{4, 0.02F}, {5, 0.9F}}, {{2, 0.02F}, {6, 0.95F}}, {{7, 1.0F}}});
  EXPECT_THAT(posted, ElementsAre(ExpertId{0, 5}, ExpertId{1, 6}));
  RunLayer(0, {0, 5});
  RunLayer(1, {0, 1});
  EXPECT_EQ(control_->prefetch_statistics().hits, 1);
  EXPECT_EQ(control_->prefetch_statistics().used, 1);
}

// A transfer takes 80 us. The near expert would be served before the others, of which two need all
// but 40 of the 200 us before their layer.
TEST_F(CacheControlPrefetchTest, ANearGuessDoesNotDelayWhatIsMoreProbableAndNeededLater) {
  MakeControl(Options(2 * kLayers));
  EarnPrefetching();
  ASSERT_EQ(RunTokens(4), 2);
  EXPECT_THAT(Prefetch({{{4, 0.7F}}, {{5, 0.9F}}}), ElementsAre(ExpertId{0, 4}, ExpertId{1, 5}));
  MakeControl(Options(2 * kLayers));
  EarnPrefetching();
  ASSERT_EQ(RunTokens(4), 2);
  EXPECT_THAT(Prefetch({{{4, 0.7F}}, {{5, 0.9F}, {6, 0.95F}}}),
              ElementsAre(ExpertId{1, 6}, ExpertId{1, 5}));
}

TEST_F(CacheControlPrefetchTest, WhatIsForeseenBetterTakesThePlaceOfWhatWaits) {
  MakeControl(Options(2 * kLayers));
  EarnPrefetching();
  ASSERT_EQ(RunTokens(4), 2);
  // Three transfers of 80 us begin within the 200 us before layer 1, but not a fourth.
  ASSERT_EQ(PostOnly({{{4, 0.9F}}, {{5, 0.85F}, {7, 0.8F}}}), 3);
  EXPECT_EQ(PostOnly({{{4, 0.9F}}, {{5, 0.85F}, {7, 0.8F}, {6, 0.75F}}}), 0);
  EXPECT_EQ(PostOnly({{{4, 0.9F}}, {{5, 0.85F}, {7, 0.8F}, {6, 0.95F}}}), 1);
  EXPECT_THAT(BringAll(), ElementsAre(ExpertId{0, 4}, ExpertId{1, 5}, ExpertId{1, 6}));
}

TEST_F(CacheControlPrefetchTest, WhatIsNotExpectedAnyMoreIsAsIfItHadNeverBeenPosted) {
  MakeControl(Options(2 * kLayers));
  EarnPrefetching();
  ASSERT_EQ(RunTokens(4), 2);
  control_->ResetStatistics();
  const auto residents = [this] {
    std::vector<std::vector<uint8_t>> of_layers;
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      of_layers.push_back(control_->Residents(layer));
    }
    return of_layers;
  };
  const auto before = residents();
  ASSERT_EQ(PostOnly({{{5, 0.9F}}, {{6, 0.9F}}}), 2);
  EXPECT_NE(residents(), before);
  EXPECT_EQ(PostOnly({{{5, 0.02F}}, {}}), 0);
  EXPECT_EQ(residents(), before);
  EXPECT_FALSE(control_->HasTransfers());
  RunTokens(1);
  EXPECT_EQ(control_->prefetch_statistics().used, 0);
  EXPECT_EQ(control_->prefetch_statistics().wasted, 0);
  for (const LayerStatistics& layer : control_->statistics()) {
    EXPECT_EQ(layer.wasted_prefetch_bytes, 0);
    EXPECT_EQ(layer.misses, 0);
  }
}

TEST_F(CacheControlPrefetchTest, WhatHasBegunIsBroughtWhateverIsForeseenLater) {
  MakeControl(Options(2 * kLayers));
  EarnPrefetching();
  ASSERT_EQ(RunTokens(4), 2);
  ASSERT_EQ(PostOnly({{{5, 0.9F}}, {{6, 0.9F}}}), 2);
  const std::optional<Chunk> chunk = control_->NextChunk();
  EXPECT_EQ(PostOnly({{}, {}}), 0);
  EXPECT_THAT(BringAll(), IsEmpty());
  control_->FinishChunk(*chunk, std::nullopt);
  EXPECT_TRUE(IsResident({0, 5}));
  EXPECT_FALSE(IsResident({1, 6}));
}

TEST_F(CacheControlPrefetchTest, WhatTheCallerAskedForByNameIsNotTakenBack) {
  MakeControl(Options(2 * kLayers));
  EarnPrefetching();
  ASSERT_EQ(RunTokens(4), 2);
  ASSERT_EQ(control_->Prefetch(1, std::vector<int64_t>{7}, 2), 1);
  EXPECT_EQ(PostOnly({{}, {}}), 0);
  EXPECT_THAT(BringAll(), ElementsAre(ExpertId{1, 7}));
}

TEST_F(CacheControlPrefetchTest, FetchesFirstLayersWhenATokenBegins) {
  MakeControl(Options(2 * kLayers));
  EXPECT_EQ(control_->BeginToken(1, now_us_), 0) << "no time is known";
  EarnPrefetching();
  ASSERT_EQ(RunTokens(4), 2);
  control_->ResetStatistics();
  EXPECT_EQ(control_->BeginToken(17, now_us_), 0) << "a prompt";
  EXPECT_THAT(Prefetch({{{5, 1.0F}}}), IsEmpty());
  EXPECT_EQ(control_->BeginToken(1, now_us_), 2);
  EXPECT_THAT(Prefetch({{{5, 0.9F}}, {{6, 0.95F}}}), ElementsAre(ExpertId{0, 5}, ExpertId{1, 6}));
  RunLayer(0, {0, 5});
  EXPECT_EQ(control_->prefetch_statistics().hits, 1);
}

TEST_F(CacheControlPrefetchTest, FirstLayerHasTheTimeThatItTookBefore) {
  MakeControl(Options(2 * kLayers));
  EarnPrefetching();
  RunTokens(4);
  // 40 of a layer's 100 us before the plan of layer 0: half of an expert, which takes 80 us.
  now_us_ += 60.0;
  control_->BeginToken(1, now_us_);
  now_us_ -= 60.0;
  RunTokens(1);
  ASSERT_EQ(control_->BeginToken(1, now_us_), 2);
  const auto posted = Prefetch({{{5, 0.25F}}, {{6, 0.25F}}});
  EXPECT_THAT(posted, ElementsAre(ExpertId{1, 6})) << "which has 140 us";
}

TEST_F(CacheControlPrefetchTest, KeepsResidentsThatAreExpected) {
  for (const bool is_expected : {true, false}) {
    MakeControl(Options(2 * kLayers));
    EarnPrefetching();
    ASSERT_EQ(RunTokens(4), 2);  // all that they need is resident, in LRU order
    const float need = is_expected ? 0.9F : 0.02F;
    EXPECT_THAT(Prefetch({{{0, need}, {1, need}, {4, 0.95F}}}), ElementsAre(ExpertId{0, 4}));
    EXPECT_EQ(IsResident({0, 0}), is_expected);
    EXPECT_EQ(IsResident({1, 0}), !is_expected) << "then another goes";
  }
}

TEST_F(CacheControlPrefetchTest, PrefetchesNothingWhereTheLinkIsTooSlow) {
  MakeControl(Options(24));
  experts_per_layer_ = 0.05;
  EXPECT_EQ(RunTokens(3), 0);
  EXPECT_THAT(Prefetch({{{5, 1.0F}}}), IsEmpty());
}

TEST_F(CacheControlPrefetchTest, PostsNothingBeforeItIsKnownToPay) {
  MakeControl(Options(24));
  EarnPrefetching();
  EXPECT_LE(control_->prefetch_statistics().used, 2 * kLayers) << "the last token's";
}

TEST_F(CacheControlPrefetchTest, PostsNothingThatIsOnlyWasted) {
  MakeControl(Options(2 * kLayers));
  for (int32_t i = 0; i < 20000; ++i) {
    RunLayer(i % kLayers, {0, 1});
    ASSERT_EQ(control_->horizon(), 0);
    ASSERT_THAT(Prefetch({{{2 + i % 6, 0.9F}}}), IsEmpty());
    ASSERT_TRUE(i < 2 * kLayers || IsResident({i % kLayers, 0}));  // nor protected or biased
  }
}

TEST_F(CacheControlPrefetchTest, EndsWherePrefetchesAreWastedFromNowOn) {
  MakeControl(Options(2 * kLayers));
  EarnPrefetching();
  int64_t num_posted = 0;
  for (int32_t i = 0; i < 20000; ++i) {
    RunLayer(i % kLayers, {0, 1});
    num_posted += std::ssize(Prefetch({{{2 + i % 6, 0.9F}}}));
  }
  EXPECT_GT(num_posted, 0);
  EXPECT_EQ(control_->horizon(), 0);
  EXPECT_THAT(Prefetch({{{5, 1.0F}}}), IsEmpty());
}

TEST_F(CacheControlPrefetchTest, AsksForPredictionsEverMoreRarelyAndAgainOnAnotherLink) {
  MakeControl(Options(2 * kLayers));
  const auto count_asked = [&] {
    int32_t num_asked = 0;
    for (int32_t i = 0; i < 60000; ++i) num_asked += RunLayer(i % kLayers, {0, 1}) > 0;
    return num_asked;
  };
  const int32_t asked_first = count_asked();
  for (int32_t i = 0; i < 4; ++i) count_asked();
  const int32_t asked_later = count_asked();
  EXPECT_LT(asked_later, 0.8 * asked_first);
  int32_t layers = 0;
  while (layers < 200000 && RunLayer(layers % kLayers, {0, 1}) > 0) ++layers;  // until it rests
  experts_per_layer_ = 0.5 * kFast;
  EXPECT_GT(RunTokens(1), 0);
}

TEST_F(CacheControlPrefetchTest, PromptsAndPausesDoNotChangeTheHorizon) {
  MakeControl(Options(24));
  EarnPrefetching();
  RunTokens(4);
  experts_per_layer_ = 0.3;
  const int32_t horizon = RunTokens(40);
  EXPECT_GE(horizon, 4);
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    now_us_ += 1e6;
    EXPECT_EQ(RunLayer(layer, {0, 1, 2, 3}, /*num_tokens=*/17), 0) << "nothing for prompts";
    EXPECT_THAT(Prefetch({{{7, 1.0F}}}), IsEmpty());
  }
  for (int32_t token = 0; token < 5; ++token) {
    now_us_ += 1e7;
    for (int32_t layer = 0; layer < kLayers; ++layer) EXPECT_EQ(RunLayer(layer, {0, 1}), horizon);
  }
}

TEST_F(CacheControlPrefetchTest, AFixedHorizonTakesTheTopKOfEachLayer) {
  MakeControl(Options(24));
  control_->set_horizon(2);
  EXPECT_EQ(RunLayer(0, {0, 1}), 2) << "without any measurement";
  const auto posted = Prefetch({{{4, 0.1F}, {5, 0.3F}, {6, 0.2F}}, {{7, 0.01F}}, {{7, 1.0F}}});
  EXPECT_THAT(posted, ElementsAre(ExpertId{1, 5}, ExpertId{1, 6}, ExpertId{2, 7}));
  control_->set_horizon(0);
  EXPECT_EQ(RunLayer(1, {0, 1}), 0);
  EXPECT_THAT(Prefetch({{{3, 1.0F}}}), IsEmpty());
}

TEST_F(CacheControlPrefetchTest, ANewHorizonForgetsWhatMissesCostWithTheLastOne) {
  const auto keys_after = [this](int32_t first_horizon, int32_t last_horizon) {
    MakeControl(Options(24, PolicyKind::kPredictedNeed));
    control_->set_horizon(first_horizon);
    for (int32_t token = 0; token < 20; ++token) RunForeseenToken(token);
    if (last_horizon != first_horizon) control_->set_horizon(last_horizon);
    RunTokens(1);
    const int64_t* keys = control_->table().expert_key;
    return std::vector(keys, keys + kLayers * kExperts);
  };
  const std::vector<int64_t> without_costs = keys_after(0, 0);
  EXPECT_NE(keys_after(Prefetcher::kAutoHorizon, Prefetcher::kAutoHorizon), without_costs);
  EXPECT_EQ(keys_after(Prefetcher::kAutoHorizon, 0), without_costs);
}

TEST_F(CacheControlPrefetchTest, ACacheThatKeepsNothingPrefetchesNothing) {
  MakeControl(Options(24, PolicyKind::kOnDemand));
  EXPECT_EQ(RunTokens(2), 0);
  control_->set_horizon(3);
  EXPECT_EQ(RunTokens(1), 0);
}

TEST_F(CacheControlPrefetchTest, RefusesWhatHasNoMeaning) {
  MakeControl(Options(24));
  EXPECT_THROW(control_->set_horizon(-2), std::invalid_argument);
  EXPECT_THROW(control_->set_horizon(9), std::invalid_argument);
  RunTokens(1);
  EXPECT_THROW(control_->PrefetchPredicted(std::vector<float>(kExperts + 1)),
               std::invalid_argument);
}

TEST_F(CacheControlPrefetchTest, ResettingTheStatisticsKeepsWhatWasLearned) {
  MakeControl(Options(24));
  EarnPrefetching();
  const int32_t horizon = RunTokens(40);
  control_->ResetStatistics();
  Prefetch({{{5, 1.0F}}});
  RunLayer(0, {0, 5});
  EXPECT_EQ(control_->prefetch_statistics().used, 1);
  control_->ResetStatistics();
  EXPECT_EQ(control_->prefetch_statistics().used, 0);
  EXPECT_EQ(RunLayer(1, {0, 1}), horizon);
}

}  // namespace
}  // namespace expertflow
