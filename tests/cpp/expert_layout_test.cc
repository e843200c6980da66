#include "core/expert_layout.h"

#include <gtest/gtest.h>

#include <stdexcept>

namespace expertflow {
namespace {

TEST(ExpertLayoutTest, SegmentsStartAtAlignedOffsets) {
  const ExpertLayout layout({{"gate_up", DType::kBFloat16, 100},  // 200 bytes, padded to 256
                             {"bias", DType::kFloat32, 64},       // exactly 256
                             {"down", DType::kFloat16, 129}});    // 258, padded to 512
  ASSERT_EQ(layout.segments().size(), 3U);
  EXPECT_EQ(layout.segments()[0].offset_bytes, 0U);
  EXPECT_EQ(layout.segments()[0].num_bytes, 200U);
  EXPECT_EQ(layout.segments()[1].offset_bytes, 256U);
  EXPECT_EQ(layout.segments()[2].offset_bytes, 512U);
  EXPECT_EQ(layout.segments()[2].num_bytes, 258U);
  EXPECT_EQ(layout.slot_bytes(), 1024U);
  EXPECT_EQ(layout.pool_bytes_per_expert(), 4096U);
}

TEST(ExpertLayoutTest, FindsTheSegmentOfAByteButNotOfPadding) {
  const ExpertLayout layout({{"a", DType::kBFloat16, 100}, {"b", DType::kFloat32, 64}});
  EXPECT_EQ(layout.SegmentAt(0).role, "a");
  EXPECT_EQ(layout.SegmentAt(199).role, "a");
  EXPECT_THROW(layout.SegmentAt(200), std::invalid_argument);
  EXPECT_EQ(layout.SegmentAt(256).role, "b");
  EXPECT_THROW(layout.SegmentAt(512), std::invalid_argument);
}

TEST(ExpertLayoutTest, RefusesNoSegmentsAndEmptyOnes) {
  EXPECT_THROW(ExpertLayout({}), std::invalid_argument);
  EXPECT_THROW(ExpertLayout({{"a", DType::kFloat32, 0}}), std::invalid_argument);
}

}  // namespace
}  // namespace expertflow
