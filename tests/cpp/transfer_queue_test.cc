#include "core/transfer_queue.h"

#include <gtest/gtest.h>

#include <optional>
#include <stdexcept>
#include <vector>

namespace expertflow {
namespace {

constexpr SlotId kA{0}, kB{1}, kC{2};
constexpr ExpertIndex kExpert{5};
constexpr auto kDemand = TransferClass::kDemand;
constexpr auto kPrefetch = TransferClass::kPrefetch;

TEST(TransferQueueTest, RefusesNoChunkSizeAndNoChunkInFlight) {
  EXPECT_THROW(TransferQueue(1, 0, 1), std::invalid_argument);
  EXPECT_THROW(TransferQueue(1, 1, 0), std::invalid_argument);
}

TEST(TransferQueueTest, RefusesASecondTransferIntoASlot) {
  TransferQueue queue(2, 100, 1);
  queue.Post(kA, kExpert, 100, kPrefetch, 1);
  EXPECT_THROW(queue.Post(kA, kExpert, 100, kDemand, 1), std::logic_error);
  const std::optional<Chunk> chunk = queue.Next();
  EXPECT_THROW(queue.Post(kA, kExpert, 100, kDemand, 1), std::logic_error) << "all handed out";
  queue.Finish(*chunk, true);
  EXPECT_NO_THROW(queue.Post(kA, kExpert, 100, kDemand, 1));
}

TEST(TransferQueueTest, ChunksOfDemandsMayBeLarger) {
  TransferQueue queue(2, 100, 9, 250);
  queue.Post(kA, kExpert, 300, kPrefetch, 1);
  EXPECT_EQ(queue.Next()->num_bytes, 100U);
  queue.Promote(kA, 1);
  EXPECT_EQ(queue.Next()->num_bytes, 200U) << "what is left of a prefetch that is promoted";
  queue.Post(kB, kExpert, 300, kDemand, 1);
  EXPECT_EQ(queue.Next()->num_bytes, 250U);
  EXPECT_EQ(queue.Next()->num_bytes, 50U);
}

TEST(TransferQueueTest, DemandsThenNearerThenEarlierPosted) {
  TransferQueue queue(6, 100, 6);
  queue.Post(SlotId{0}, kExpert, 100, kPrefetch, 7);
  queue.Post(SlotId{1}, kExpert, 100, kPrefetch, 5);
  queue.Post(SlotId{2}, kExpert, 100, kPrefetch, 5);
  queue.Post(SlotId{3}, kExpert, 100, kDemand, 9);
  queue.Post(SlotId{4}, kExpert, 100, kDemand, 8);
  queue.Post(SlotId{5}, kExpert, 100, kDemand, 9);
  std::vector<int32_t> order;
  while (const std::optional<Chunk> chunk = queue.Next()) order.push_back(Index(chunk->slot));
  EXPECT_EQ(order, (std::vector<int32_t>{4, 3, 5, 1, 2, 0}));
}

TEST(TransferQueueTest, ADemandOvertakesARunningPrefetchAfterTheChunksInFlight) {
  constexpr int32_t kInFlight = 2;
  TransferQueue queue(3, 100, kInFlight);
  queue.Post(kA, kExpert, 1000, kPrefetch, 1);
  std::vector<Chunk> out;
  while (const std::optional<Chunk> chunk = queue.Next()) out.push_back(*chunk);
  ASSERT_EQ(out.size(), static_cast<size_t>(kInFlight));
  queue.Post(kB, kExpert, 200, kDemand, 9);
  for (const Chunk& chunk : out) {
    EXPECT_EQ(chunk.slot, kA);
    EXPECT_EQ(queue.Finish(chunk, true), TransferStatus::kInFlight);
    EXPECT_EQ(queue.Next()->slot, kB) << "each chunk that ends makes room for the demand";
  }
}

TEST(TransferQueueTest, APromotedPrefetchGoesFirst) {
  TransferQueue queue(3, 100, 1);
  queue.Post(kA, kExpert, 100, kDemand, 5);
  queue.Post(kB, kExpert, 100, kPrefetch, 1);
  queue.Post(kC, kExpert, 100, kPrefetch, 1);
  queue.Promote(kC, 4);
  EXPECT_EQ(queue.Next()->slot, kC);
}

TEST(TransferQueueTest, TheLastChunkIsTheRest) {
  TransferQueue queue(1, 100, 3);
  queue.Post(kA, kExpert, 250, kDemand, 1);
  EXPECT_EQ(queue.queued_bytes(), 250U);
  EXPECT_EQ(queue.Next()->num_bytes, 100U);
  EXPECT_EQ(queue.Next()->num_bytes, 100U);
  const std::optional<Chunk> last = queue.Next();
  EXPECT_EQ(last->offset_bytes, 200U);
  EXPECT_EQ(last->num_bytes, 50U);
  EXPECT_EQ(queue.queued_bytes(), 0U);
}

TEST(TransferQueueTest, CancelBeforeTheStartLeavesNothing) {
  TransferQueue queue(1, 100, 1);
  queue.Post(kA, kExpert, 250, kPrefetch, 1);
  EXPECT_TRUE(queue.Cancel(kA));
  EXPECT_TRUE(queue.IsIdle(kA));
  EXPECT_FALSE(queue.Next().has_value());
}

TEST(TransferQueueTest, ACancelledTransferIsDroppedWithItsLastChunkEvenIfThatFails) {
  for (const bool succeeds : {true, false}) {
    TransferQueue queue(1, 100, 2);
    queue.Post(kA, kExpert, 300, kPrefetch, 1);
    const Chunk first = *queue.Next(), second = *queue.Next();
    EXPECT_FALSE(queue.Cancel(kA));
    EXPECT_EQ(queue.Finish(second, true), TransferStatus::kInFlight);
    EXPECT_FALSE(queue.IsIdle(kA)) << "the slot is still being written";
    EXPECT_EQ(queue.Finish(first, succeeds), TransferStatus::kDropped);
    EXPECT_TRUE(queue.IsIdle(kA));
    EXPECT_EQ(queue.copied_bytes(kA), succeeds ? 200U : 100U);
  }
}

TEST(TransferQueueTest, AFailureEndsWithTheLastChunkThatIsOut) {
  TransferQueue queue(1, 100, 2);
  queue.Post(kA, kExpert, 400, kDemand, 1);
  const Chunk first = *queue.Next(), second = *queue.Next();
  EXPECT_EQ(queue.Finish(first, false), TransferStatus::kInFlight);
  EXPECT_FALSE(queue.Next().has_value()) << "no more of a transfer that failed";
  EXPECT_EQ(queue.Finish(second, true), TransferStatus::kFailed);
  EXPECT_TRUE(queue.IsIdle(kA));
}

// The failure belongs to the prefetch: whoever needs the expert now must not pay for it.
TEST(TransferQueueTest, AChunkFromBeforeThePromotionMayFail) {
  for (const bool fails_before : {true, false}) {
    TransferQueue queue(1, 100, 2);
    queue.Post(kA, kExpert, 200, kPrefetch, 1);
    const Chunk first = *queue.Next(), second = *queue.Next();
    if (fails_before) queue.Finish(first, false);
    queue.Promote(kA, 1);
    if (!fails_before) queue.Finish(first, false);
    EXPECT_FALSE(queue.Next().has_value()) << "a chunk of the first try is still being written";
    EXPECT_EQ(queue.Finish(second, true), TransferStatus::kInFlight);
    EXPECT_EQ(queue.Finish(*queue.Next(), true), TransferStatus::kInFlight);
    const std::optional<Chunk> last = queue.Next();
    EXPECT_EQ(last->offset_bytes, 100U);
    EXPECT_EQ(queue.Finish(*last, false), TransferStatus::kFailed) << "but only once";
  }
}

TEST(TransferQueueTest, AChunkFromAfterThePromotionMustNotFail) {
  TransferQueue queue(1, 100, 2);
  queue.Post(kA, kExpert, 200, kPrefetch, 1);
  queue.Promote(kA, 1);
  EXPECT_EQ(queue.Finish(*queue.Next(), false), TransferStatus::kFailed);
}

}  // namespace
}  // namespace expertflow
