#include "core/layer_clock.h"

#include <gtest/gtest.h>

namespace expertflow {
namespace {

Plan PlanOf(int32_t layer, bool streaming = false) {
  return {.layer = layer, .streaming = streaming, .rows = {}};
}

TEST(LayerClockTest, ComputeTimeIsWhatStallsLeave) {
  LayerClock clock;
  clock.RecordPlan(PlanOf(0), 1000.0);
  EXPECT_FALSE(clock.last()) << "one plan is no interval";
  clock.RecordStall(30.0, /*is_late=*/false);
  clock.RecordStall(20.0, /*is_late=*/true);
  clock.RecordMoved(700);
  clock.RecordPlan(PlanOf(1), 1150.0);
  ASSERT_TRUE(clock.last());
  EXPECT_EQ(clock.last()->compute_us, 100.0);
  EXPECT_EQ(clock.last()->stall_us, 50.0);
  EXPECT_EQ(clock.last()->late_stall_us, 20.0);
  EXPECT_EQ(clock.last()->moved_bytes, 700.0);
  clock.RecordPlan(PlanOf(2), 1250.0);
  EXPECT_EQ(clock.last()->stall_us, 0.0) << "every layer for itself";
  EXPECT_EQ(clock.last()->moved_bytes, 0.0);
}

TEST(LayerClockTest, FirstLayerIsTimedFromTheBeginOfItsToken) {
  LayerClock clock;
  EXPECT_EQ(clock.first_us(), 0.0);
  clock.BeginToken(1000.0);
  clock.RecordPlan(PlanOf(0), 1030.0);
  EXPECT_EQ(clock.first_us(), 30.0);
  clock.RecordPlan(PlanOf(1), 1130.0);
  clock.RecordPlan(PlanOf(0), 5000.0);  // a token whose begin nobody told
  EXPECT_EQ(clock.first_us(), 30.0) << "as measured before";
  clock.BeginToken(6000.0);
  clock.RecordPlan(PlanOf(0, /*streaming=*/true), 7000.0);
  EXPECT_EQ(clock.first_us(), 30.0) << "a prompt is no token";
  clock.BeginToken(8000.0);
  clock.BeginToken(9000.0);  // the token before was given up
  clock.RecordPlan(PlanOf(0), 9050.0);
  EXPECT_EQ(clock.first_us(), 50.0);
}

TEST(LayerClockTest, TimeBetweenPassesIsNotComputeTime) {
  LayerClock clock;
  clock.RecordPlan(PlanOf(0), 0.0);
  clock.RecordPlan(PlanOf(1), 100.0);
  clock.RecordStall(40.0, /*is_late=*/false);
  clock.RecordPlan(PlanOf(0), 1e9);  // the user thought for a quarter of an hour
  ASSERT_TRUE(clock.last());
  EXPECT_EQ(clock.last()->compute_us, 100.0) << "as measured before";
  EXPECT_EQ(clock.last()->stall_us, 40.0);
  clock.RecordPlan(PlanOf(2), 2e9);
  EXPECT_EQ(clock.last()->compute_us, 100.0) << "nor is a layer that was left out";
}

TEST(LayerClockTest, PromptsAreNotMeasured) {
  LayerClock clock;
  clock.RecordPlan(PlanOf(0), 0.0);
  clock.RecordPlan(PlanOf(1), 100.0);
  for (int32_t layer = 0; layer < 2; ++layer) {
    clock.RecordPlan(PlanOf(layer, /*streaming=*/true), 1000.0 * layer + 1000.0);
    EXPECT_FALSE(clock.last());
    clock.RecordStall(500.0, /*is_late=*/true);
    clock.RecordMoved(1 << 20);
  }
  clock.RecordPlan(PlanOf(2), 3000.0);  // what lies between is still the prompt's
  EXPECT_FALSE(clock.last());
  clock.RecordPlan(PlanOf(3), 3120.0);
  ASSERT_TRUE(clock.last());
  EXPECT_EQ(clock.last()->compute_us, 120.0);
  EXPECT_EQ(clock.last()->stall_us, 0.0);
  EXPECT_EQ(clock.last()->moved_bytes, 0.0);
}

TEST(LayerClockTest, AModelOfOneLayerIsNeverMeasured) {
  LayerClock clock;
  for (int pass = 0; pass < 5; ++pass) {
    clock.RecordPlan(PlanOf(0), 100.0 * pass);
    EXPECT_FALSE(clock.last());
  }
}

}  // namespace
}  // namespace expertflow
