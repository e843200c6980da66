// The selection of victims by a block of threads, run on threads of the CPU, against a sort.

#include "core/block_selection.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "host_block.h"

namespace expertflow {
namespace {

constexpr int64_t kLowestRank = std::numeric_limits<int64_t>::min();

template <int32_t kTieBits = 0>
uint32_t OrderOfRank(int64_t rank, int64_t origin, int32_t slot = 0) {
  const bool is_protected = rank >= kProtected / 2;
  return OrderOf<kTieBits>(is_protected ? rank - kProtected : rank, slot, is_protected, origin);
}

// Slot s belongs to thread s % num_threads.
struct RankSource {
  const std::vector<int64_t>& ranks;
  int64_t origin;
  int32_t thread;
  int32_t num_threads;

  static constexpr int32_t kPerTile = 2;

  template <class Visitor>
  void VisitTiles(Visitor&& visit) const {
    const auto num_ranks = static_cast<int32_t>(ranks.size());
    for (int32_t first = thread; first < num_ranks; first += kPerTile * num_threads) {
      const auto candidate = [&](int32_t k) {
        const int32_t s = first + k * num_threads;
        return SlotCandidate{s < num_ranks ? ranks[static_cast<size_t>(s)] : kNoRank, s, -s};
      };
      const auto order = [&](int32_t k) {
        const int64_t rank = candidate(k).rank;
        return rank == kNoRank ? kNoOrder : OrderOfRank(rank, origin, candidate(k).slot);
      };
      const uint32_t orders[kPerTile] = {order(0), order(1)};
      visit(orders, candidate);
    }
  }
};

std::vector<int32_t> SelectOnBlock(const std::vector<int64_t>& ranks, int32_t count,
                                   int32_t num_threads, int64_t origin) {
  auto shared = std::make_unique<BlockSelection>();
  std::ranges::fill(shared->least, kNoOrder);
  std::vector<int32_t> num_found(static_cast<size_t>(num_threads));
  RunHostBlock(num_threads, [&](HostBlock& block) {
    RankSource source{ranks, origin, block.thread(), block.num_threads()};
    uint32_t least[RankSource::kPerTile] = {kNoOrder, kNoOrder};
    source.VisitTiles([&](const uint32_t (&orders)[RankSource::kPerTile], const auto&) {
      for (int32_t k = 0; k < RankSource::kPerTile; ++k) least[k] = std::min(least[k], orders[k]);
    });
    ShareLeast(block, *shared, least);
    block.Sync();
    SortLeast(block, *shared);
    block.Sync();
    num_found[static_cast<size_t>(block.thread())] =
        SelectSmallest(block, *shared, source, Smallest(least), count);
  });
  EXPECT_EQ(std::ranges::count(num_found, num_found.front()), num_threads)
      << "the threads disagree";
  std::vector<int32_t> slots;
  for (int32_t i = 0; i < num_found.front(); ++i) {
    const auto [slot, held] = shared->victims[i];
    EXPECT_EQ(held, -slot) << "of another slot";
    slots.push_back(slot);
  }
  return slots;
}

std::vector<int32_t> SelectBySorting(const std::vector<int64_t>& ranks, int32_t count) {
  std::vector<Candidate> candidates;
  for (size_t s = 0; s < ranks.size(); ++s) {
    if (ranks[s] != kNoRank) candidates.push_back({ranks[s], static_cast<int32_t>(s)});
  }
  std::ranges::sort(candidates, [](const Candidate& a, const Candidate& b) { return a < b; });
  candidates.resize(std::min(candidates.size(), static_cast<size_t>(count)));
  std::vector<int32_t> slots;
  for (const Candidate& candidate : candidates) slots.push_back(candidate.slot);
  return slots;
}

void ExpectAsSorted(const std::vector<int64_t>& ranks, int32_t count, int32_t num_threads = 32) {
  for (const int64_t origin : {int64_t{0}, int64_t{100}, int64_t{1} << 40}) {
    EXPECT_EQ(SelectOnBlock(ranks, count, num_threads, origin), SelectBySorting(ranks, count))
        << count << " of " << ranks.size() << " by " << num_threads << " threads, from " << origin;
  }
}

TEST(BlockSelectionTest, FindsTheSmallestInOrder) {
  std::mt19937_64 random(1);
  for (const int32_t count : {1, 2, 7, 8, 9, 16, 40}) {
    std::vector<int64_t> ranks(500);
    for (int64_t& rank : ranks) rank = static_cast<int64_t>(random()) / 2;
    ExpectAsSorted(ranks, count);
    ExpectAsSorted(ranks, count, 64);
  }
}

TEST(BlockSelectionTest, TiesGoToTheLowerSlot) {
  std::mt19937_64 random(2);
  std::vector<int64_t> ranks(300);
  for (int64_t& rank : ranks) rank = static_cast<int64_t>(random() % 20);
  for (const int32_t count : {1, 8, 30}) ExpectAsSorted(ranks, count);
}

TEST(BlockSelectionTest, ManyMoreEqualRanksThanTheListHolds) {
  ExpectAsSorted(std::vector<int64_t>(1000, kStreamedKey), 8);
  ExpectAsSorted(std::vector<int64_t>(1000, kStreamedKey), 20, 64);
  ExpectAsSorted(std::vector<int64_t>(200, kStreamedKey), 40);  // a later list, too
}

TEST(BlockSelectionTest, EmptySlotsComeInTheirOrder) {
  ExpectAsSorted(std::vector<int64_t>(1000, kEmptyKey), 20, 64);
}

TEST(BlockSelectionTest, MoreSmallRanksInOneBinThanTheListHolds) {
  std::vector<int64_t> ranks(3000);
  for (size_t s = 0; s < ranks.size(); ++s) {
    ranks[s] = static_cast<int64_t>(s % BlockSelection::kNumBins == 3 ? s : 1'000'000 - s);
  }
  ExpectAsSorted(ranks, 8);
  ExpectAsSorted(ranks, 17);
}

TEST(BlockSelectionTest, FewerCandidatesThanWanted) {
  std::vector<int64_t> ranks(200, kNoRank);
  ExpectAsSorted(ranks, 5);
  ranks[7] = 3;
  ranks[190] = -1;
  ExpectAsSorted(ranks, 2);
  ExpectAsSorted(ranks, 5);
  for (size_t s = 20; s < 32; ++s) ranks[s] = static_cast<int64_t>(s);
  ExpectAsSorted(ranks, 20);
}

TEST(BlockSelectionTest, RanksAtBothEndsOfTheirRange) {
  ExpectAsSorted({kNoRank - 1, kLowestRank, 0, -1, kLowestRank, kProtected}, 6);
}

TEST(BlockSelectionTest, OrdersAreNeverAgainstTheRanks) {
  std::mt19937_64 random(4);
  for (const int64_t origin : {int64_t{0}, int64_t{1'000}, int64_t{1} << 40, kProtected / 4}) {
    std::vector<int64_t> ranks{kLowestRank, -1, 0, 1, kProtected - 1, kProtected, kNoRank - 1};
    for (int i = 0; i < 1000; ++i) {
      const auto near = static_cast<int64_t>(random() % (uint64_t{1} << (random() % 34)));
      ranks.push_back(std::max<int64_t>(origin - near, 0) + (random() % 2 == 0 ? kProtected : 0));
      ranks.push_back(origin + near);
    }
    std::ranges::sort(ranks);
    for (size_t i = 1; i < ranks.size(); ++i) {
      ASSERT_LE(OrderOfRank(ranks[i - 1], origin), OrderOfRank(ranks[i], origin))
          << i << ", " << origin;
      ASSERT_LT(OrderOfRank(ranks[i], origin), kNoOrder);
    }
  }
  EXPECT_LT(OrderOfRank(999, 1'000), OrderOfRank(1'000, 1'000))
      << "near the origin all are told apart";
}

TEST(BlockSelectionTest, OrdersTellSlotsOfEqualKeysApart) {
  constexpr int64_t kOrigin = int64_t{1} << 40;
  for (const int64_t near : {-131'072, -1, 0, 131'071}) {
    const auto order = [=](int64_t more, int32_t slot) {
      return OrderOfRank<12>(kOrigin + near + more, kOrigin, slot);
    };
    EXPECT_LT(order(0, 0), order(0, 1));
    EXPECT_LT(order(0, 1), order(0, 4094));
    EXPECT_LE(order(0, 4095), order(0, 100'000));
    EXPECT_LT(order(0, 100'000), order(1, 0));
  }
  const auto far = int64_t{1} << 30;
  EXPECT_LE(OrderOfRank<12>(kOrigin - far, kOrigin, 4095),
            OrderOfRank<12>(kOrigin - far + 1, kOrigin, 0));
  EXPECT_LE(OrderOfRank<12>(kOrigin + far, kOrigin, 4095),
            OrderOfRank<12>(kOrigin + far + 1, kOrigin, 0));
  EXPECT_LT(OrderOfRank(kEmptyKey, kOrigin, 1), OrderOfRank(kEmptyKey, kOrigin, 2));
  EXPECT_LE(OrderOfRank(kEmptyKey, kOrigin, 100'000), OrderOfRank(-1, kOrigin, 0));
}

TEST(BlockSelectionTest, RandomSizesAndShares) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 60; ++i) {
    std::vector<int64_t> ranks(1 + random() % 400);
    const uint64_t spread = 1 + random() % 300;
    for (int64_t& rank : ranks) {
      rank = random() % 4 == 0 ? kNoRank : static_cast<int64_t>(random() % spread);
    }
    ExpectAsSorted(ranks, static_cast<int32_t>(1 + random() % 24));
  }
}

}  // namespace
}  // namespace expertflow
