#include "core/slot_table.h"

#include <gtest/gtest.h>

#include <limits>
#include <stdexcept>

namespace expertflow {
namespace {

TEST(SlotTableTest, StartsEmpty) {
  const SlotTable table(2, 3, 4);
  const SlotTableView& view = table.view();
  for (int32_t e = 0; e < 6; ++e) EXPECT_EQ(view.expert_slot[e], SlotId::kNone);
  for (int32_t s = 0; s < 4; ++s) {
    EXPECT_EQ(view.slot_expert[s], ExpertIndex::kNone);
    EXPECT_EQ(view.slot_state[s], SlotState::kEmpty);
    EXPECT_EQ(view.slot_key[s], kEmptyKey);
  }
}

TEST(SlotTableTest, IdsAndIndicesAreInverse) {
  const SlotTable table(3, 5, 1);
  for (int32_t i = 0; i < 15; ++i) {
    const ExpertId id = ToId(table.view(), ExpertIndex{i});
    EXPECT_EQ(ToIndex(table.view(), id), ExpertIndex{i});
  }
  EXPECT_EQ(ToIndex(table.view(), {2, 1}), ExpertIndex{11});
}

TEST(SlotTableTest, AssignEvictsWhatTheSlotHeld) {
  SlotTable table(1, 3, 2);
  const SlotTableView& view = table.view();
  Assign(view, SlotId{1}, ExpertIndex{0});
  view.slot_state[1] = SlotState::kReady;
  view.slot_predicted[1] = 9;
  view.slot_unused[1] = 1;
  Assign(view, SlotId{1}, ExpertIndex{2});
  EXPECT_EQ(view.expert_slot[0], SlotId::kNone);
  EXPECT_EQ(view.expert_slot[2], SlotId{1});
  EXPECT_EQ(view.slot_expert[1], ExpertIndex{2});
  EXPECT_EQ(view.slot_state[1], SlotState::kPosted);
  EXPECT_EQ(view.slot_predicted[1], kNever) << "the prediction was of another expert";
  EXPECT_EQ(view.slot_unused[1], 0);
}

TEST(SlotTableTest, GenerationGrowsWithEveryAssignment) {
  SlotTable table(1, 2, 1);
  const SlotTableView& view = table.view();
  Assign(view, SlotId{0}, ExpertIndex{0});
  const uint32_t first = view.slot_generation[0];
  Unassign(view, SlotId{0});
  EXPECT_EQ(view.slot_generation[0], first);
  Assign(view, SlotId{0}, ExpertIndex{0});
  EXPECT_EQ(view.slot_generation[0], first + 1);
}

TEST(SlotTableTest, UnassignOfAnEmptySlotChangesNothing) {
  SlotTable table(1, 2, 2);
  const SlotTableView& view = table.view();
  Assign(view, SlotId{0}, ExpertIndex{1});
  Unassign(view, SlotId{1});
  EXPECT_EQ(view.expert_slot[1], SlotId{0});
  EXPECT_EQ(view.slot_state[1], SlotState::kEmpty);
}

TEST(SlotTableTest, RefusesSizesThatAreNotPositiveOrDoNotFit) {
  EXPECT_THROW(SlotTable(0, 1, 1), std::invalid_argument);
  EXPECT_THROW(SlotTable(1, -1, 1), std::invalid_argument);
  EXPECT_THROW(SlotTable(1, 1, 0), std::invalid_argument);
  EXPECT_THROW(SlotTable(1 << 16, 1 << 16, 1), std::invalid_argument);
}

}  // namespace
}  // namespace expertflow
