#include "core/prefetch_scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/bandwidth_estimator.h"
#include "core/horizon_controller.h"

namespace expertflow {
namespace {

constexpr size_t kExpertBytes = 8'000'000;
constexpr double kExpertsPerUs = 1e-6 / 8e6;  // times bytes per second
constexpr int32_t kLayersPerToken = 24;

// A layer every 100 us, one expert to fetch, no stall.
int32_t Step(HorizonController& controller, double bytes_per_second, int32_t num_fetched = 1,
             double stall_us = 0.0) {
  controller.RecordLayer(100.0, stall_us, stall_us, num_fetched);
  return controller.Update(bytes_per_second, 0.0);
}

TEST(HorizonControllerTest, LooksAheadAsFarAsTheBurstTakes) {
  HorizonController controller(8, 4, kExpertBytes);
  EXPECT_EQ(Step(controller, 0.0), 0);    // not measured yet
  EXPECT_EQ(Step(controller, 100e9), 1);  // 80 us
  EXPECT_EQ(Step(controller, 25e9), 4);   // 320 us
  EXPECT_EQ(Step(controller, 8e9), 8);    // 1000 us: S_max
  EXPECT_EQ(Step(controller, 5e9), 0);    // 1600 us: twice what S_max hides
  EXPECT_EQ(Step(controller, 6.5e9), 0);  // not fast enough again
  EXPECT_EQ(Step(controller, 8e9), 8);
  for (int i = 0; i < 1000; ++i) Step(controller, 100e9, i % 10 == 0 ? 4 : 0);
  EXPECT_EQ(controller.burst(), 4);  // one layer in ten is more than 5 %
  EXPECT_EQ(controller.horizon(), 4);
}

TEST(HorizonControllerTest, LooksOneLayerAheadHoweverFastTheLink) {
  HorizonController controller(8, 4, kExpertBytes);
  EXPECT_EQ(Step(controller, 8e12), 1);  // 1 us
}

TEST(HorizonControllerTest, QueuedBytesCount) {
  HorizonController controller(8, 4, kExpertBytes);
  for (int i = 0; i < 1000; ++i) {
    controller.RecordLayer(100.0, 0.0, 0.0, 1);
    controller.Update(100e9, 2.0 * kExpertBytes);
  }
  EXPECT_EQ(controller.horizon(), 3);
}

TEST(HorizonControllerTest, SettlesForConstantInput) {
  for (const double stall_us : {0.0, 0.01, 0.1, 10.0}) {
    HorizonController controller(8, 4, kExpertBytes);
    for (int i = 0; i < 10000; ++i) Step(controller, 55e9, 1, stall_us);
    const int32_t settled = controller.horizon();
    for (int i = 0; i < 10000; ++i) ASSERT_EQ(Step(controller, 55e9, 1, stall_us), settled);
  }
}

TEST(HorizonControllerTest, NoiseAroundAWholeLayerDoesNotSwingIt) {
  HorizonController controller(8, 4, kExpertBytes);
  int changes = 0;
  for (int i = 0; i < 5000; ++i) {
    const int32_t before = controller.horizon();
    // 2 layers and 10 % to either side.
    changes += Step(controller, 40e9 * (i % 3 == 0 ? 0.9 : 1.1)) != before;
  }
  EXPECT_LE(changes, 1);
}

TEST(HorizonControllerTest, FollowsTheBandwidthWithin50Tokens) {
  HorizonController controller(8, 4, kExpertBytes);
  BandwidthEstimator bandwidth;
  double now_us = 0.0;
  // One expert a token.
  const auto run_50_tokens = [&](double bytes_per_second) {
    for (int token = 0; token < 50; ++token) {
      const double end_us = now_us + 1.0 / (kExpertsPerUs * bytes_per_second);
      bandwidth.Record(kExpertBytes, now_us, end_us);
      now_us = end_us + 2400.0;
      for (int i = 0; i < kLayersPerToken; ++i) Step(controller, bandwidth.bytes_per_second());
    }
    return controller.horizon();
  };
  EXPECT_EQ(run_50_tokens(55e9), 2);  // 1.45 layers
  EXPECT_EQ(run_50_tokens(27.5e9), 3);
  EXPECT_EQ(run_50_tokens(55e9), 2);
  EXPECT_EQ(run_50_tokens(110e9), 1);
}

// The late stall of a layer, where every layer ahead takes `gain` of it.
double LateUs(const HorizonController& controller, double gain) {
  return 8.0 * std::pow(1.0 - gain, controller.horizon());
}

TEST(HorizonControllerTest, LateStallRaisesItWhileThatHelpsAndItsEndLowersIt) {
  HorizonController controller(8, 4, kExpertBytes);
  for (int i = 0; i < 40 * 1024; ++i) Step(controller, 100e9, 1, LateUs(controller, 0.3));
  EXPECT_EQ(controller.horizon(), 8);
  for (int i = 0; i < 20 * 1024; ++i) Step(controller, 100e9, 1, 0.0);
  EXPECT_EQ(controller.horizon(), 1);
}

TEST(HorizonControllerTest, LateStallDoesNotRaiseItWhereThatDoesNotHelp) {
  HorizonController controller(8, 4, kExpertBytes);
  for (int i = 0; i < 10 * 1024; ++i) Step(controller, 100e9, 1, LateUs(controller, 0.0));
  for (int i = 0; i < 40 * 1024; ++i) {
    ASSERT_EQ(Step(controller, 100e9, 1, LateUs(controller, 0.0)), 1);
  }
  // Ten times as late: it is tried again.
  int32_t highest = 0;
  for (int i = 0; i < 10 * 1024; ++i) highest = std::max(highest, Step(controller, 100e9, 1, 80.0));
  EXPECT_EQ(highest, 2);
}

// As in a small cache, where what is fetched early takes the place of what is needed before it.
TEST(HorizonControllerTest, LooksLessFarAheadThanTheLeadWhereThatSavesStall) {
  HorizonController controller(8, 4, kExpertBytes);
  for (int i = 0; i < 60 * 1024; ++i) Step(controller, 25e9, 1, 2.0 * controller.horizon());
  EXPECT_EQ(controller.horizon(), 1) << "of a lead of 4";
  // A layer more is tried again once the stall has grown, and stays where it saves.
  for (int i = 0; i < 60 * 1024; ++i) Step(controller, 25e9, 1, 40.0 / controller.horizon());
  EXPECT_EQ(controller.horizon(), 8);
}

// One layer in forty waits, and a longer horizon shortens or lengthens that wait.
TEST(HorizonControllerTest, ADuelIsWonByMoreThanChance) {
  for (const double gain : {-0.1, 0.0, 0.4}) {
    HorizonController controller(8, 4, kExpertBytes);
    uint32_t random = 7;
    for (int i = 0; i < 20 * 1024; ++i) {
      random = random * 1664525 + 1013904223;
      const double noise_us = (random >> 16) % 40 == 0 ? 400.0 : 0.0;
      Step(controller, 100e9, 1, noise_us * std::pow(1.0 - gain, controller.horizon()));
    }
    const bool is_worth_it = gain > 0.0;
    EXPECT_EQ(controller.horizon() > 1, is_worth_it) << gain;
  }
}

// A horizon of 2 costs half as much again, in a noise that hides it for some pairs of blocks.
TEST(HorizonControllerTest, ALosingDuelEndsBeforeItIsAsSureAsAVictory) {
  HorizonController controller(8, 4, kExpertBytes);
  uint32_t random = 7;
  int num_tried = 0;
  for (int i = 0; i < 18 * 1024; ++i) {
    random = random * 1664525 + 1013904223;
    const double noise_us = (random >> 16) % 40 == 0 ? 400.0 : 0.0;
    num_tried += Step(controller, 100e9, 1, noise_us * 0.5 * (1 + controller.horizon())) > 1;
  }
  EXPECT_GE(num_tried, 8 * 128);
  EXPECT_LT(num_tried, 32 * 128) << "of 64 blocks at most";
}

// A burst of stalls was why it was tried, and the next burst, no larger, is no new reason.
TEST(HorizonControllerTest, WhatABurstOfStallsTriedIsNotTriedAgainInTheNext) {
  HorizonController controller(8, 4, kExpertBytes);
  for (int i = 0; i < 4 * 1024 && controller.horizon() < 2; ++i) Step(controller, 100e9, 1, 20.0);
  ASSERT_EQ(controller.horizon(), 2);
  for (int i = 0; i < 1024 && controller.horizon() == 2; ++i) Step(controller, 100e9, 1, 20.0);
  for (int i = 0; i < 4 * 1024; ++i) Step(controller, 100e9, 1, 8.0);
  for (int i = 0; i < 10 * 1024; ++i) ASSERT_EQ(Step(controller, 100e9, 1, 20.0), 1);
}

class PrefetchSchedulerTest : public testing::Test {
 protected:
  // One layer in which `used` of the prefetches were needed and `wasted` were not.
  int32_t Layer(int32_t used, int32_t wasted) {
    return scheduler_.BeginLayer({.compute_us = 100.0,
                                  .stall_us = 10.0,
                                  .num_fetched = used + 1,
                                  .num_prefetch_used = used,
                                  .num_prefetch_wasted = wasted,
                                  .moved_bytes = 2.0 * kExpertBytes,
                                  .bytes_per_second = 80e9});
  }

  PrefetchScheduler scheduler_{{.max_horizon = 8, .max_fetched = 4, .expert_bytes = kExpertBytes}};
};

TEST_F(PrefetchSchedulerTest, AdmitsNothingBeforeTheLinkIsMeasured) {
  EXPECT_EQ(scheduler_.BeginLayer({.compute_us = 100.0, .num_fetched = 1}), 0);
  EXPECT_FALSE(scheduler_.Admits({1, 0, 1.0F}, kExpertBytes, 0));
}

TEST_F(PrefetchSchedulerTest, WeighsNeedAgainstWhatFitsBeforeTheLayer) {
  Layer(1, 0);  // a transfer takes 100 us, as a layer does; the price is about 1/4
  EXPECT_TRUE(scheduler_.Admits({1, 0, 0.22F}, kExpertBytes, 0));  // 1/5 is the border
  EXPECT_FALSE(scheduler_.Admits({1, 0, 0.18F}, kExpertBytes, 0));
  // With half an expert ahead only half of it is hidden: 1/3 is the border.
  EXPECT_TRUE(scheduler_.Admits({1, 0, 0.36F}, kExpertBytes, kExpertBytes / 2));
  EXPECT_FALSE(scheduler_.Admits({1, 0, 0.3F}, kExpertBytes, kExpertBytes / 2));
  // The link has no time left before the layer, even for what is needed for sure.
  EXPECT_FALSE(scheduler_.Admits({1, 0, 1.0F}, kExpertBytes, kExpertBytes));
  EXPECT_TRUE(scheduler_.Admits({2, 0, 0.22F}, kExpertBytes, kExpertBytes));
}

TEST_F(PrefetchSchedulerTest, HasTimeForWhatFitsBeforeTheLayer) {
  Layer(1, 0);  // a transfer takes 100 us, as a layer does
  EXPECT_TRUE(scheduler_.HasTimeFor(kExpertBytes, 1));
  EXPECT_FALSE(scheduler_.HasTimeFor(3 * kExpertBytes / 2, 1));
  EXPECT_TRUE(scheduler_.HasTimeFor(2 * kExpertBytes, 2));
}

TEST_F(PrefetchSchedulerTest, PriceRisesToItsLimitWherePrefetchesAreWasted) {
  for (int i = 0; i < 5000; ++i) Layer(0, 1);
  EXPECT_EQ(scheduler_.price(), PrefetchScheduler::kMaxPrice);
  EXPECT_GT(scheduler_.horizon(), 0) << "to end is for the trial";
}

// Regretted evictions cost what fetches stall: next to nothing where nearly all are hidden.
TEST_F(PrefetchSchedulerTest, PriceRisesWithRegretOnlyWhereFetchesStall) {
  for (const double stall_us : {100.0, 1.0}) {
    PrefetchScheduler scheduler({.max_horizon = 8, .max_fetched = 4, .expert_bytes = kExpertBytes});
    for (int i = 0; i < 5000; ++i) {
      scheduler.BeginLayer({.compute_us = 100.0,
                            .stall_us = stall_us,
                            .num_fetched = 1,
                            .num_prefetch_used = 1,
                            .num_prefetch_regretted = 1,
                            .moved_bytes = 1.0 * kExpertBytes,
                            .bytes_per_second = 80e9});  // 100 us a transfer
    }
    const double expected =
        stall_us > 50.0 ? PrefetchScheduler::kMaxPrice : PrefetchScheduler::kMinPrice;
    EXPECT_EQ(scheduler.price(), expected) << stall_us << " us of stall a fetch";
  }
}

// The 200 us of stall a layer are 2048 transfers in the balance, and its margin 20.
TEST_F(PrefetchSchedulerTest, PriceRisesWhereThereIsNextToNothingToGain) {
  for (int i = 0; i < 5000; ++i) {
    scheduler_.BeginLayer({.compute_us = 100.0,
                           .stall_us = 200.0,
                           .num_fetched = 2,
                           .num_prefetch_used = i % 200 == 0,
                           .moved_bytes = 2.0 * kExpertBytes,
                           .bytes_per_second = 80e9});
  }
  EXPECT_EQ(scheduler_.price(), PrefetchScheduler::kMaxPrice);
}

TEST_F(PrefetchSchedulerTest, PriceFallsWhileNothingIsWastedAndSettlesInBetween) {
  for (int i = 0; i < 20000; ++i) Layer(1, 0);
  EXPECT_EQ(scheduler_.price(), PrefetchScheduler::kMinPrice);
  // The waste follows the price, as if a lower threshold let in more that is wrong.
  double owed = 0.0;
  const auto run_layer = [&] {
    owed += 0.1 / scheduler_.price();
    const auto wasted = static_cast<int32_t>(owed);
    owed -= wasted;
    Layer(1, wasted);
  };
  for (int i = 0; i < 50000; ++i) run_layer();
  const double settled = scheduler_.price();
  EXPECT_GT(settled, 2 * PrefetchScheduler::kMinPrice);
  EXPECT_LT(settled, 0.5 * PrefetchScheduler::kMaxPrice);
  for (int i = 0; i < 5000; ++i) {
    run_layer();
    ASSERT_NEAR(scheduler_.price(), settled, 0.02 * settled);
  }
}

}  // namespace
}  // namespace expertflow
