#include "core/trial_rest.h"

#include <gtest/gtest.h>

namespace expertflow {
namespace {

constexpr double kBandwidth = 50e9;
constexpr double kLayerUs = 100.0;

// How many layers the rest takes on a machine that stays as it is.
int64_t CountLayers(TrialRest& rest) {
  int64_t num_layers = 0;
  while (rest.is_on()) {
    EXPECT_FALSE(rest.Advance(kBandwidth, kLayerUs));
    ++num_layers;
  }
  return num_layers;
}

class TrialRestTest : public testing::Test {
 protected:
  TrialRestTest() { rest_.Advance(kBandwidth, kLayerUs); }

  TrialRest rest_;
};

TEST_F(TrialRestTest, IsOffAtFirst) { EXPECT_FALSE(rest_.is_on()); }

TEST_F(TrialRestTest, EachTakesTwiceAsLongUpToTheLongest) {
  for (const int64_t layers : {2048, 4096, 8192, 10000, 10000}) {
    rest_.Begin(10000);
    EXPECT_EQ(CountLayers(rest_), layers);
  }
  rest_.Shorten();
  rest_.Begin(10000);
  EXPECT_EQ(CountLayers(rest_), TrialRest::kFirstLayers);
}

TEST_F(TrialRestTest, EndsOnAnotherLink) {
  for (const double factor : {0.5, 2.0}) {
    rest_.Advance(kBandwidth, kLayerUs);
    rest_.Begin(10000);
    EXPECT_FALSE(rest_.Advance(1.1 * kBandwidth, kLayerUs)) << "next to nothing";
    EXPECT_TRUE(rest_.Advance(factor * kBandwidth, kLayerUs));
    EXPECT_FALSE(rest_.is_on());
  }
}

TEST_F(TrialRestTest, EndsWhereLayersComputeForLongerFromNowOn) {
  rest_.Begin(10000);
  EXPECT_FALSE(rest_.Advance(kBandwidth, 5 * kLayerUs)) << "one layer alone";
  int num_layers = 0;
  while (rest_.is_on() && num_layers < 1000) {
    rest_.Advance(kBandwidth, 2 * kLayerUs);
    ++num_layers;
  }
  EXPECT_GT(num_layers, 5);
  EXPECT_LT(num_layers, 64);
}

TEST_F(TrialRestTest, TheNextIsAShortOneOnAnotherMachine) {
  rest_.Begin(10000);
  CountLayers(rest_);
  rest_.Begin(10000);
  ASSERT_TRUE(rest_.Advance(2 * kBandwidth, kLayerUs));
  rest_.Advance(kBandwidth, kLayerUs);
  rest_.Begin(10000);
  EXPECT_EQ(CountLayers(rest_), TrialRest::kFirstLayers);
}

}  // namespace
}  // namespace expertflow
