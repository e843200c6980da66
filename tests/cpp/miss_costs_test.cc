#include "core/miss_costs.h"

#include <gtest/gtest.h>

#include <cmath>

namespace expertflow {
namespace {

constexpr double kTransferUs = 300.0;
constexpr int kTokens = 4000;

TEST(MissCostsTest, NothingIsKnownAtFirst) {
  const MissCosts costs(2);
  EXPECT_EQ(costs.bias(0), costs.bias(1));
}

TEST(MissCostsTest, ALayerThatWaitsIsDearerThanOneWhoseTransfersAreHidden) {
  MissCosts costs(3);
  for (int i = 0; i < kTokens; ++i) {
    costs.Record(0, 2 * kTransferUs, 2, kTransferUs);
    costs.Record(1, 0.0, 2, kTransferUs);
    costs.Record(2, kTransferUs, 2, kTransferUs);
  }
  // Logits in 1024ths: a miss costs 1, 0 and 1/2 transfers, and 0.03 more.
  EXPECT_NEAR(costs.bias(0), 1024 * std::log(1.03), 2);
  EXPECT_NEAR(costs.bias(1), 1024 * std::log(0.031), 2);
  EXPECT_NEAR(costs.bias(2), 1024 * std::log(0.53), 2);
}

TEST(MissCostsTest, ALayerThatFetchesNothingCostsATransferAgain) {
  MissCosts costs(1);
  for (int i = 0; i < kTokens; ++i) costs.Record(0, 0.0, 1, kTransferUs);
  for (int i = 0; i < kTokens; ++i) costs.Record(0, 0.0, 0, kTransferUs);
  EXPECT_NEAR(costs.bias(0), 0, 50);
}

}  // namespace
}  // namespace expertflow
