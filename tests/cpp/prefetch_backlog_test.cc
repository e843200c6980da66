#include "core/prefetch_backlog.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "allocation_counter.h"

namespace expertflow {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

constexpr int32_t kSlots = 24;
constexpr size_t kChunkBytes = 10;
constexpr size_t kExpertBytes = 40;
constexpr SlotId kA{0}, kB{1}, kC{2};

class PrefetchBacklogTest : public testing::Test {
 protected:
  void Post(SlotId slot, Tick needed_at) {
    const ExpertIndex expert{next_expert_++ % (2 * kSlots)};
    if (table_.view().expert_slot[Index(expert)] != SlotId::kNone) return Post(slot, needed_at);
    Assign(table_.view(), slot, expert);
    queue_.Post(slot, expert, kExpertBytes, TransferClass::kPrefetch, needed_at);
  }

  void PostAndAdd(SlotId slot, Tick needed_at) {
    Post(slot, needed_at);
    backlog_.Add(slot, needed_at);
  }

  // Takes back what waits, and puts the rest behind, to be needed at tick `behind`.
  std::vector<SlotId> EndUndecided(Tick behind) {
    std::vector<SlotId> undecided;
    undecided.reserve(kSlots);
    const int64_t before = num_allocations;
    backlog_.EndUndecided([&](SlotId slot, Tick) {
      undecided.push_back(slot);
      if (queue_.IsWaitingPrefetch(slot)) return queue_.Cancel(slot);
      queue_.Reschedule(slot, behind);
      return false;
    });
    EXPECT_EQ(num_allocations, before);
    return undecided;
  }

  SlotTable table_{1, 2 * kSlots, kSlots};
  TransferQueue queue_{kSlots, kChunkBytes, 2};
  PrefetchBacklog backlog_{table_.view(), queue_, kExpertBytes};
  int32_t next_expert_ = 0;
};

TEST_F(PrefetchBacklogTest, WhatIsQueuedCountsOnlyOnceItIsKept) {
  PostAndAdd(kA, 3);
  PostAndAdd(kB, 5);
  backlog_.Reopen(2);
  EXPECT_EQ(backlog_.bytes_until(8), 0U);
  EXPECT_TRUE(backlog_.IsUndecided(kB, 5));
  EXPECT_FALSE(backlog_.IsUndecided(kB, 4)) << "another need";
  backlog_.Keep(kB, 3);
  backlog_.Admit(2);
  EXPECT_FALSE(backlog_.IsUndecided(kB, 5));
  EXPECT_EQ(backlog_.bytes_until(1), 0U);
  EXPECT_EQ(backlog_.bytes_until(2), kExpertBytes);
  EXPECT_EQ(backlog_.bytes_until(3), 2 * kExpertBytes);
  EXPECT_THAT(EndUndecided(9), ElementsAre(kA));
  backlog_.Reopen(2);
  EXPECT_FALSE(backlog_.IsUndecided(kA, 3)) << "it was taken back";
  EXPECT_TRUE(backlog_.IsUndecided(kB, 5));
}

TEST_F(PrefetchBacklogTest, OfWhatHasBegunTheRestIsDecided) {
  PostAndAdd(kA, 3);
  PostAndAdd(kB, 3);
  queue_.Next();
  backlog_.Reopen(2);
  EXPECT_EQ(backlog_.bytes_until(8), 0U);
  EXPECT_TRUE(backlog_.IsUndecided(kA, 3));
  backlog_.Keep(kA, 1);
  EXPECT_EQ(backlog_.bytes_until(0), 0U);
  EXPECT_EQ(backlog_.bytes_until(1), kExpertBytes - kChunkBytes);
  EXPECT_THAT(EndUndecided(9), ElementsAre(kB));
}

TEST_F(PrefetchBacklogTest, WhatWasPutBehindIsDecidedAnewByItsOwnNeed) {
  PostAndAdd(kA, 5);
  queue_.Next();
  backlog_.Reopen(2);
  EXPECT_THAT(EndUndecided(11), ElementsAre(kA));
  EXPECT_EQ(queue_.needed_at(kA), 11);
  backlog_.Reopen(3);
  EXPECT_EQ(backlog_.bytes_until(8), 0U);
  EXPECT_TRUE(backlog_.IsUndecided(kA, 5));
  backlog_.Keep(kA, 2);
  EXPECT_THAT(EndUndecided(12), IsEmpty());
}

TEST_F(PrefetchBacklogTest, WhatIsHandedOutIsNotDecidedAnyMore) {
  PostAndAdd(kA, 5);
  for (size_t bytes = 0; bytes < kExpertBytes; bytes += kChunkBytes) {
    queue_.Finish(*queue_.Next(), true);
  }
  backlog_.Reopen(2);
  EXPECT_THAT(EndUndecided(9), IsEmpty());
}

TEST_F(PrefetchBacklogTest, SettledIsAllButWhatWaitsOrWasPutBehind) {
  PostAndAdd(kA, 3);
  PostAndAdd(kB, 4);
  EXPECT_EQ(backlog_.settled_bytes(), 0U);
  queue_.Next();
  EXPECT_EQ(backlog_.settled_bytes(), kExpertBytes - kChunkBytes);
  Post(kC, 5);
  EXPECT_EQ(backlog_.settled_bytes(), 2 * kExpertBytes - kChunkBytes) << "somebody else's stays";
  queue_.Reschedule(kA, 9);
  EXPECT_EQ(backlog_.settled_bytes(), kExpertBytes) << "it is behind now";
}

TEST_F(PrefetchBacklogTest, WhatADemandTookOverIsNoPrefetch) {
  PostAndAdd(kA, 3);
  queue_.Promote(kA, 3);
  EXPECT_EQ(backlog_.settled_bytes(), kExpertBytes);
  backlog_.Reopen(3);
  EXPECT_EQ(backlog_.bytes_until(8), 0U);
  EXPECT_THAT(EndUndecided(9), IsEmpty());
}

TEST_F(PrefetchBacklogTest, WhatIsOverdueIsUndecidedLikeTheRest) {
  PostAndAdd(kA, 3);
  backlog_.Reopen(7);
  EXPECT_EQ(backlog_.bytes_until(0), 0U);
  EXPECT_THAT(EndUndecided(9), ElementsAre(kA));
}

TEST_F(PrefetchBacklogTest, WhatSomebodyElsePostedStays) {
  PostAndAdd(kA, 3);
  queue_.Cancel(kA);
  Unassign(table_.view(), kA);
  Post(kA, 4);
  Post(kC, 4);
  backlog_.Reopen(2);
  EXPECT_EQ(backlog_.bytes_until(2), 2 * kExpertBytes);
  EXPECT_THAT(EndUndecided(9), IsEmpty());
}

// Random transfers beside a model that remembers for each slot what was handed out.
class RandomBacklogTest : public PrefetchBacklogTest {
 protected:
  struct Transfer {
    Tick needed_at;
    bool is_ours;
    bool is_prefetch;
    size_t left_bytes;
    Tick queued_for;  // later than needed_at if it was put behind
  };

  int32_t Draw(int32_t lowest, int32_t highest) {
    return std::uniform_int_distribution<int32_t>(lowest, highest)(random_);
  }

  static bool IsDecided(const Transfer& transfer) {
    return transfer.is_ours && transfer.is_prefetch && transfer.left_bytes > 0;
  }
  static bool IsSettled(const Transfer& transfer) {
    return !IsDecided(transfer) ||
           (transfer.left_bytes < kExpertBytes && transfer.queued_for == transfer.needed_at);
  }

  void Step() {
    const SlotId slot{Draw(0, kSlots - 1)};
    const auto found = transfers_.find(slot);
    switch (Draw(0, 5)) {
      case 0:
        if (found != transfers_.end() && found->second.left_bytes > 0) {
          queue_.Promote(slot, now_);
          found->second.is_prefetch = false;
        }
        break;
      case 1:
        CopyChunk();
        break;
      default:
        if (queue_.IsIdle(slot)) PostSome(slot);
    }
  }

  void PostSome(SlotId slot) {
    Unassign(table_.view(), slot);
    const Tick needed_at = now_ + Draw(1, PrefetchBacklog::kMaxDistance);
    const bool is_ours = Draw(0, 4) > 0;
    is_ours ? PostAndAdd(slot, needed_at) : Post(slot, needed_at);
    transfers_[slot] = {needed_at, is_ours, true, kExpertBytes, needed_at};
  }

  void CopyChunk() {
    const std::optional<Chunk> chunk = queue_.Next();
    if (!chunk) return;
    transfers_.at(chunk->slot).left_bytes -= chunk->num_bytes;
    queue_.Finish(*chunk, true);
  }

  void DecideAnew() {
    const int64_t before = num_allocations;
    const size_t settled_bytes = backlog_.settled_bytes();
    backlog_.Reopen(now_);
    EXPECT_EQ(num_allocations, before);
    std::map<SlotId, Transfer> counted;
    size_t expected_bytes = 0;
    for (const auto& [slot, transfer] : transfers_) {
      EXPECT_EQ(backlog_.IsUndecided(slot, transfer.needed_at), IsDecided(transfer));
      if (!IsDecided(transfer)) counted[slot] = transfer;
      if (IsSettled(transfer)) expected_bytes += transfer.left_bytes;
    }
    EXPECT_EQ(settled_bytes, expected_bytes);
    CheckBytes(counted);
    std::vector<SlotId> expected;
    for (auto& [slot, transfer] : transfers_) {
      if (!IsDecided(transfer)) continue;
      const auto distance = static_cast<int32_t>(transfer.needed_at - now_);
      if (distance > 0 && Draw(0, 1)) {
        backlog_.Keep(slot, distance);
        queue_.Reschedule(slot, transfer.needed_at);
        transfer.queued_for = transfer.needed_at;
        counted[slot] = transfer;
      } else {
        expected.push_back(slot);
      }
    }
    CheckBytes(counted);
    const Tick behind = now_ + PrefetchBacklog::kMaxDistance + 1;
    std::vector<SlotId> undecided = EndUndecided(behind);
    std::ranges::sort(undecided);
    EXPECT_EQ(undecided, expected);
    for (const SlotId slot : undecided) {
      if (transfers_.at(slot).left_bytes == kExpertBytes) {
        transfers_.erase(slot);
        ++num_taken_;
      } else {
        transfers_.at(slot).queued_for = behind;
        ++num_put_behind_;
      }
    }
  }

  void CheckBytes(const std::map<SlotId, Transfer>& counted) const {
    for (int32_t d = 0; d <= PrefetchBacklog::kMaxDistance; ++d) {
      size_t bytes = 0;
      for (const auto& [slot, transfer] : counted) {
        if (transfer.is_prefetch && transfer.needed_at <= now_ + d) bytes += transfer.left_bytes;
      }
      EXPECT_EQ(backlog_.bytes_until(d), bytes) << "distance " << d;
    }
  }

  std::mt19937 random_{1};
  std::map<SlotId, Transfer> transfers_;  // the last of each slot
  Tick now_ = 0;
  int num_taken_ = 0;
  int num_put_behind_ = 0;
};

TEST_F(RandomBacklogTest, CountsAndTakesAsTheModel) {
  for (now_ = 0; now_ < 3000 && !HasFailure(); ++now_) {
    SCOPED_TRACE("tick " + std::to_string(now_));
    for (int32_t i = Draw(0, 8); i > 0; --i) Step();
    if (Draw(0, 3) > 0) DecideAnew();
  }
  EXPECT_GT(num_taken_, 1000);
  EXPECT_GT(num_put_behind_, 50);
}

}  // namespace
}  // namespace expertflow
