#include "core/savings_evidence.h"

#include <gtest/gtest.h>

namespace expertflow {
namespace {

TEST(SavingsEvidenceTest, IsNoneBeforeTheFourthBlock) {
  SavingsEvidence evidence;
  for (int block = 1; block <= 4; ++block) {
    evidence.Record(100.0);
    EXPECT_EQ(evidence.has_enough(), block == 4);
    EXPECT_EQ(evidence.IsAbove(4.0), block == 4);
  }
}

TEST(SavingsEvidenceTest, NothingSavedIsNotAbove) {
  SavingsEvidence evidence;
  for (int block = 0; block < 100; ++block) evidence.Record(0.0);
  EXPECT_FALSE(evidence.IsAbove(0.0));
  evidence.Record(-1.0);
  EXPECT_FALSE(evidence.IsAbove(0.0));
}

// The sum over n blocks is n, and its standard error 3 sqrt(n).
TEST(SavingsEvidenceTest, NoisySavingsTakeAsManyBlocksAsTheirErrorSays) {
  SavingsEvidence evidence;
  const auto record = [&](int num_blocks) {
    for (int block = 0; block < num_blocks; ++block) evidence.Record(block % 2 == 0 ? 4.0 : -2.0);
  };
  record(100);
  EXPECT_FALSE(evidence.IsAbove(4.0)) << "100 against 30";
  EXPECT_TRUE(evidence.IsAbove(3.0));
  record(100);
  EXPECT_TRUE(evidence.IsAbove(4.0)) << "200 against 42";
}

TEST(SavingsEvidenceTest, ForgetsWhatWasLongAgo) {
  SavingsEvidence evidence;
  for (int block = 0; block < 10000; ++block) evidence.Record(1.0);
  for (int block = 0; block < 500; ++block) evidence.Record(-1.0);
  EXPECT_TRUE(evidence.IsAbove(0.0));
  for (int block = 0; block < 500; ++block) evidence.Record(-1.0);
  EXPECT_FALSE(evidence.IsAbove(0.0));
}

}  // namespace
}  // namespace expertflow
