#include "core/bandwidth_estimator.h"

#include <gtest/gtest.h>

namespace expertflow {
namespace {

constexpr size_t kMegabyte = 1'000'000;

// Records copies of 1 MB each, one after the other, on a link of `megabytes_per_second`.
double RecordCopies(BandwidthEstimator& estimator, double megabytes_per_second, int count,
                    double begin_us) {
  const double copy_us = 1e6 / megabytes_per_second;
  for (int i = 0; i < count; ++i, begin_us += copy_us) {
    estimator.Record(kMegabyte, begin_us, begin_us + copy_us);
  }
  return begin_us;
}

TEST(BandwidthEstimatorTest, IsZeroBeforeTheFirstCopyAndExactAfterIt) {
  BandwidthEstimator estimator;
  EXPECT_EQ(estimator.bytes_per_second(), 0.0);
  estimator.Record(kMegabyte, 500.0, 600.0);
  EXPECT_DOUBLE_EQ(estimator.bytes_per_second(), 1e10);
}

TEST(BandwidthEstimatorTest, CopiesThatOverlapShareTheTime) {
  BandwidthEstimator estimator;
  estimator.Record(kMegabyte, 0.0, 100.0);
  estimator.Record(kMegabyte, 0.0, 100.0);  // beside the first: 2 MB in 100 us
  estimator.Record(kMegabyte, 100.0, 150.0);
  EXPECT_NEAR(estimator.bytes_per_second(), 3e6 / 150e-6, 3e6 / 150e-6 * 0.02);
}

TEST(BandwidthEstimatorTest, IdleTimeDoesNotCount) {
  BandwidthEstimator estimator;
  for (int i = 0; i < 10; ++i) {
    const double begin_us = i * 1e6;
    estimator.Record(kMegabyte, begin_us, begin_us + 100.0);
  }
  EXPECT_NEAR(estimator.bytes_per_second(), 1e10, 1.0);
}

TEST(BandwidthEstimatorTest, EndsThatAreReportedOutOfOrderDoNoHarm) {
  BandwidthEstimator estimator;
  for (int i = 0; i < 1000; ++i) {  // two threads; the later end is reported first
    const double begin_us = i * 100.0;
    estimator.Record(kMegabyte, begin_us + 1.0, begin_us + 100.0);
    estimator.Record(kMegabyte, begin_us, begin_us + 99.0);
  }
  EXPECT_NEAR(estimator.bytes_per_second(), 2e10, 0.03 * 2e10);
}

TEST(BandwidthEstimatorTest, ACopyThatTookNoTimeDoesNotBreakIt) {
  BandwidthEstimator estimator;
  estimator.Record(kMegabyte, 10.0, 10.0);
  EXPECT_EQ(estimator.bytes_per_second(), 0.0);
  estimator.Record(kMegabyte, 10.0, 110.0);
  EXPECT_DOUBLE_EQ(estimator.bytes_per_second(), 2e10);
}

TEST(BandwidthEstimatorTest, FollowsALinkThatHalves) {
  BandwidthEstimator estimator(64e6);
  const double end_us = RecordCopies(estimator, 10'000.0, 500, 0.0);
  EXPECT_NEAR(estimator.bytes_per_second(), 1e10, 1e7);
  const double half_us = RecordCopies(estimator, 5'000.0, 64, end_us);  // one half-life
  EXPECT_GT(estimator.bytes_per_second(), 5.5e9);
  EXPECT_LT(estimator.bytes_per_second(), 8e9);
  RecordCopies(estimator, 5'000.0, 64 * 7, half_us);
  EXPECT_NEAR(estimator.bytes_per_second(), 5e9, 0.02 * 5e9);
}

TEST(BandwidthEstimatorTest, OneSlowCopyMovesItLittle) {
  BandwidthEstimator estimator(64e6);
  const double end_us = RecordCopies(estimator, 10'000.0, 500, 0.0);
  estimator.Record(kMegabyte, end_us, end_us + 500.0);  // 5 times slower
  EXPECT_GT(estimator.bytes_per_second(), 0.94e10);
}

}  // namespace
}  // namespace expertflow
