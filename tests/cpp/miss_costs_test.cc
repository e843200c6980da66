#include "core/miss_costs.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/eviction/need_model.h"

namespace expertflow {
namespace {

constexpr double kTransferUs = 300.0;
constexpr int kTokens = 4000;
constexpr int kOne = 1 << NeedModel::kFractionBits;

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
  // A miss costs 1, 0 and 1/2 transfers, and 0.03 more.
  EXPECT_NEAR(costs.bias(0), kOne * std::log(1.03), kOne / 512);
  EXPECT_NEAR(costs.bias(1), kOne * std::log(0.031), kOne / 512);
  EXPECT_NEAR(costs.bias(2), kOne * std::log(0.53), kOne / 512);
}

TEST(MissCostsTest, ALayerThatFetchesNothingCostsATransferAgain) {
  MissCosts costs(1);
  for (int i = 0; i < kTokens; ++i) costs.Record(0, 0.0, 1, kTransferUs);
  for (int i = 0; i < kTokens; ++i) costs.Record(0, 0.0, 0, kTransferUs);
  EXPECT_NEAR(costs.bias(0), 0, kOne / 20);
}

}  // namespace
}  // namespace expertflow
