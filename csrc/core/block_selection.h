#pragma once

#include <cstdint>
#include <limits>

#include "core/host_device.h"
#include "core/planning.h"

// The victims of a plan, found by a block of threads: what Planner::Scan is on the host.
//
// Every thread offers the candidates of its own slots. The n-th smallest of the warps' minima is a
// bound that at least n candidates keep, and not many more. Those that keep it go into a short
// list, where each counts how many are smaller than itself, which is its place in the order. More
// victims than there are warps take several passes. Until the list, ranks are compared by 32 bits
// of theirs (OrderOf), which a warp reduces in one instruction; the list is exact.
//
// A `Block` is what a CUDA block gives its threads: kWarpSize, thread(), num_threads() (whole
// warps), Sync(), within a warp Ballot(flag), MinOfWarp(value) and MaxOfWarp(value), and
// Add(counter, amount), which is atomic and returns the value before. A `Source` has the calling
// thread's candidates, some at once: VisitTiles(f) calls f(orders [kPerTile], candidate), where
// candidate(k) is that of the k-th order; kNoOrder is none.

namespace expertflow {

constexpr int32_t kMaxBlockWarps = 32;
constexpr int32_t kMaxBlockVictims = 512;
constexpr int64_t kNoRank = std::numeric_limits<int64_t>::max();  // above every rank
constexpr int64_t kLowestRank = std::numeric_limits<int64_t>::min();
constexpr uint32_t kNoOrder = std::numeric_limits<uint32_t>::max();  // above every order
constexpr int32_t kHighestSlot = std::numeric_limits<int32_t>::max();

// Never decreases with the rank, `key` or above all others if protected, and tells keys apart that
// lie within 2^30 of `origin`; the rest is left to the list. In few instructions of 32 bits.
EXPERTFLOW_HD inline uint32_t OrderOf(int64_t key, bool is_protected, int64_t origin) {
  constexpr uint32_t kHighest = (uint32_t{1} << 31) - 2;
  const uint64_t distance = static_cast<uint64_t>(key) - static_cast<uint64_t>(origin) + (1U << 30);
  const auto high = static_cast<int32_t>(distance >> 32);
  const auto low = static_cast<uint32_t>(distance);
  const uint32_t at_most = (high > 0) | (low > kHighest) ? kHighest : low;
  // The distance of an empty slot overflows.
  const bool is_lowest = (high < 0) | ((key < 0) & !is_protected);
  return (is_lowest ? 0 : at_most) | (is_protected ? uint32_t{1} << 31 : 0U);
}

EXPERTFLOW_HD inline uint32_t Smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Lies in the shared memory of the block.
struct BlockSelection {
  // A plan of misses alone offers more, as the oldest slots lie side by side, in few warps: two
  // passes over short lists take less time than one over a list of 128 or 256, as measured.
  static constexpr int32_t kListCapacity = 64;

  alignas(16) uint32_t warp_least[kMaxBlockWarps];  // the warps' smallest orders; at first kNoOrder
  Candidate list[kListCapacity];
  int32_t num_listed[2];  // of this list and of the next; 0 before the first pass
  Candidate last;         // the last victim of the pass
  int32_t victims[kMaxBlockVictims];
};

// Shares `least`, the smallest order of the thread's candidates; to be read after a barrier.
template <class Block>
EXPERTFLOW_DEVICE void ShareLeast(Block& block, BlockSelection& shared, uint32_t least) {
  least = block.MinOfWarp(least);
  if (block.thread() % Block::kWarpSize == 0) {
    shared.warp_least[block.thread() / Block::kWarpSize] = least;
  }
}

// An order that at least `wanted` candidates do not exceed, and all candidates if there are fewer
// warps that have any.
template <class Block>
EXPERTFLOW_DEVICE uint32_t BoundOfOrders(Block& block, const BlockSelection& shared,
                                         int32_t wanted) {
  const int32_t num_warps = block.num_threads() / Block::kWarpSize;
  uint32_t bound = 0;
  EXPERTFLOW_NO_UNROLL
  for (int32_t i = block.thread() % Block::kWarpSize; i < num_warps; i += Block::kWarpSize) {
    const uint32_t least = shared.warp_least[i];
    int32_t num_smaller = 0;
    EXPERTFLOW_NO_UNROLL
    for (int32_t first = 0; first < num_warps; first += 4) {
      EXPERTFLOW_UNROLL
      for (int32_t k = 0; k < 4; ++k) num_smaller += shared.warp_least[first + k] < least ? 1 : 0;
    }
    if (num_smaller < wanted && least > bound) bound = least;
  }
  bound = block.MaxOfWarp(bound);
  return bound < kNoOrder ? bound : kNoOrder - 1;
}

// Puts the listed candidates' places among the first `wanted` into `victims`; a warp for each
// candidate, with the lanes comparing it until it is out.
template <class Block>
EXPERTFLOW_DEVICE void OrderList(Block& block, BlockSelection& shared, int32_t num_listed,
                                 int32_t wanted, int32_t* victims) {
  const int32_t lane = block.thread() % Block::kWarpSize;
  const int32_t num_warps = block.num_threads() / Block::kWarpSize;
  EXPERTFLOW_NO_UNROLL
  for (int32_t i = block.thread() / Block::kWarpSize; i < num_listed; i += num_warps) {
    const Candidate candidate = shared.list[i];
    int32_t place = 0;
    EXPERTFLOW_NO_UNROLL
    for (int32_t first = 0; first < num_listed && place < wanted; first += Block::kWarpSize) {
      const int32_t j = first + lane;
      place += CountBits(block.Ballot(j < num_listed && shared.list[j] < candidate));
    }
    if (lane != 0 || place >= wanted) continue;
    victims[place] = candidate.slot;
    if (place == wanted - 1) shared.last = candidate;
  }
}

// One pass: the `wanted` smallest candidates above `floor`, of which the thread's smallest has the
// order `least`. Returns how many there are. `parity` says which counter is free, and turns with
// every use.
template <class Block, class Source>
EXPERTFLOW_DEVICE int32_t SelectAbove(Block& block, BlockSelection& shared, Source& source,
                                      const Candidate& floor, uint32_t least, int32_t wanted,
                                      int32_t* victims, int32_t& parity) {
  constexpr int32_t kListCapacity = BlockSelection::kListCapacity;
  const uint32_t bound = BoundOfOrders(block, shared, wanted);
  Candidate ceiling{kNoRank, kHighestSlot};
  bool is_bounded = floor.slot >= 0;  // by more than orders
  for (;;) {
    int32_t& counter = shared.num_listed[parity];
    if (least <= bound) {
      source.VisitTiles([&](const uint32_t (&orders)[Source::kPerTile], const auto& candidate) {
        uint32_t kept = 0;
        EXPERTFLOW_UNROLL
        for (int32_t k = 0; k < Source::kPerTile; ++k) {
          kept |= orders[k] <= bound ? uint32_t{1} << k : 0;
        }
        if (is_bounded) {
          EXPERTFLOW_UNROLL
          for (int32_t k = 0; k < Source::kPerTile; ++k) {
            const Candidate offered = candidate(k);
            const bool lies_between = (floor < offered) & !(ceiling < offered);
            kept &= lies_between ? ~uint32_t{0} : ~(uint32_t{1} << k);
          }
        }
        if (kept == 0) return;
        int32_t place = block.Add(counter, CountBits(kept));
        EXPERTFLOW_UNROLL
        for (int32_t k = 0; k < Source::kPerTile; ++k) {
          if ((kept >> k & 1) == 0) continue;
          if (place < kListCapacity) shared.list[place] = candidate(k);
          ++place;
        }
      });
    }
    block.Sync();
    const int32_t num_kept = counter;
    const int32_t num_listed = num_kept < kListCapacity ? num_kept : kListCapacity;
    parity ^= 1;
    if (block.thread() == 0) shared.num_listed[parity] = 0;
    OrderList(block, shared, num_listed, wanted, victims);
    block.Sync();
    if (num_kept <= kListCapacity) return num_kept < wanted ? num_kept : wanted;
    // Too many, because of equal orders or one crowded warp: what fitted gives a lower bound.
    ceiling = shared.last;
    is_bounded = true;
  }
}

// Fills `shared.victims` with the slots of the `count` smallest candidates, in order, and returns
// how many there are; `count` is at least 1. Before, every thread has called ShareLeast with its
// `least` and a barrier, and `shared.num_listed` is 0. All threads may read the result.
template <class Block, class Source>
EXPERTFLOW_DEVICE int32_t SelectSmallest(Block& block, BlockSelection& shared, Source& source,
                                         uint32_t least, int32_t count) {
  const int32_t num_warps = block.num_threads() / Block::kWarpSize;
  Candidate floor{kLowestRank, -1};
  int32_t parity = 0;
  int32_t num_found = 0;
  for (;;) {
    const int32_t rest = count - num_found;
    const int32_t wanted = rest < num_warps ? rest : num_warps;
    const int32_t found = SelectAbove(block, shared, source, floor, least, wanted,
                                      shared.victims + num_found, parity);
    num_found += found;
    if (found < wanted || num_found == count) return num_found;
    floor = shared.last;
    least = kNoOrder;
    source.VisitTiles([&](const uint32_t (&orders)[Source::kPerTile], const auto& candidate) {
      EXPERTFLOW_UNROLL
      for (int32_t k = 0; k < Source::kPerTile; ++k) {
        const bool is_less = (floor < candidate(k)) & (orders[k] < least);
        least = is_less ? orders[k] : least;
      }
    });
    ShareLeast(block, shared, least);
    block.Sync();
  }
}

}  // namespace expertflow
