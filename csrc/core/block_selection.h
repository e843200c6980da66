#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/host_device.h"
#include "core/planning.h"

// The victims of a plan, found by a block of threads: what Planner::Scan is on the host.
//
// Every thread offers the candidates of its own slots. Threads are dealt to bins; the n-th smallest
// of the bins' minima is a bound that at least n candidates keep, and not many more. Those that
// keep it go into a short list, where each counts how many are smaller than itself, which is its
// place in the order. More victims than there are bins take several passes. Until the list, ranks
// are compared by 32 bits of theirs (OrderOf); the list is exact.
//
// A `Block` is what a CUDA block gives its threads: kWarpSize, thread(), num_threads() (whole
// warps), Sync(), of a warp Ballot(flag) and OfLane(value, lane), and, atomic, Min(value, other)
// and Add(counter, amount), which returns the value before. A `Source` has the calling thread's
// candidates, some at once: VisitTiles(f) calls f(orders [kPerTile], candidate), where candidate(k)
// is the SlotCandidate of the k-th order; kNoOrder is none.

namespace expertflow {

constexpr int32_t kMaxBlockWarps = 32;
constexpr int32_t kMaxBlockVictims = 512;
constexpr int64_t kNoRank = std::numeric_limits<int64_t>::max();     // above every rank
constexpr uint32_t kNoOrder = std::numeric_limits<uint32_t>::max();  // above every order
constexpr int32_t kHighestSlot = std::numeric_limits<int32_t>::max();

// A Candidate with what its slot holds, so that nobody looks for that later.
struct SlotCandidate {
  int64_t rank;
  int32_t slot;
  int32_t held;  // not compared

  EXPERTFLOW_HD friend bool operator<(const SlotCandidate& a, const SlotCandidate& b) {
    return (a.rank < b.rank) | ((a.rank == b.rank) & (a.slot < b.slot));
  }
};

EXPERTFLOW_HD inline uint32_t Smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

template <size_t kCount>
EXPERTFLOW_DEVICE uint32_t Smallest(const uint32_t (&orders)[kCount]) {
  uint32_t smallest = orders[0];
  EXPERTFLOW_UNROLL
  for (size_t k = 1; k < kCount; ++k) smallest = Smaller(smallest, orders[k]);
  return smallest;
}

// Never decreases with the rank, `key` or above all others if protected, nor, at equal ranks, with
// the slot. Tells keys apart that lie within 2^(30 - kTieBits) of `origin`, of empty slots the
// first, and by kTieBits the first slots of equal keys; the rest is left to the list. In few
// instructions of 32 bits.
template <int32_t kTieBits>
EXPERTFLOW_HD inline uint32_t OrderOf(int64_t key, int32_t slot, bool is_protected,
                                      int64_t origin) {
  constexpr uint32_t kNumEmpty = 1U << 16;
  constexpr uint32_t kHighest = (uint32_t{1} << 31) - 2 - kNumEmpty;
  constexpr uint32_t kLastTie = (uint32_t{1} << kTieBits) - 1;
  const uint64_t distance =
      static_cast<uint64_t>(key) - static_cast<uint64_t>(origin) + (uint32_t{1} << (30 - kTieBits));
  const auto high = static_cast<int32_t>(distance >> 32);
  const auto low = static_cast<uint32_t>(distance);
  const auto number = static_cast<uint32_t>(slot);
  const uint32_t told_apart = (low << kTieBits) + Smaller(number, kLastTie);
  const bool is_highest = (high > 0) | (low >= kHighest >> kTieBits);
  const uint32_t at_most = is_highest ? kHighest : told_apart;
  // The distance of an empty slot overflows.
  const bool is_lowest = (high < 0) | ((key < 0) & !is_protected);
  const uint32_t base = key == kEmptyKey ? Smaller(number, kNumEmpty) : kNumEmpty;
  return (base + (is_lowest ? 0 : at_most)) | (is_protected ? uint32_t{1} << 31 : 0U);
}

// Lies in the shared memory of the block.
struct BlockSelection {
  static constexpr int32_t kNumBins = 32;
  static constexpr int32_t kListCapacity = 64;  // a longer list takes longer than a second pass

  struct Victim {
    int32_t slot;
    int32_t held;
  };

  alignas(16) uint32_t least[kNumBins];  // the bins' smallest orders; at first kNoOrder
  uint32_t sorted[kNumBins];             // the same in order
  SlotCandidate list[kListCapacity];
  int32_t num_listed[2];  // of this list and of the next; 0 before the first pass
  // Of what a pass may list, where that is bounded. In memory: registers would hold them, and what
  // is compared with them, also where nothing is.
  SlotCandidate floor;    // the last victim of the pass before
  SlotCandidate ceiling;  // the last that was listed when there were too many
  Victim victims[kMaxBlockVictims];
};

// Shares the smallest orders that the thread has at each place of its tiles; called by whole warps.
// Places next to each other go to different bins: slots that were filled together are as old, and
// all of them victims.
template <class Block, size_t kPerTile>
EXPERTFLOW_DEVICE void ShareLeast(Block& block, BlockSelection& shared,
                                  const uint32_t (&least)[kPerTile]) {
  constexpr int32_t kLanesApart = Block::kWarpSize / 4;
  uint32_t of_bin = least[0];
  EXPERTFLOW_UNROLL
  for (int32_t k = 1; k < static_cast<int32_t>(kPerTile); ++k) {
    const int32_t lane = (block.thread() + kLanesApart * k) % Block::kWarpSize;
    of_bin = Smaller(of_bin, block.OfLane(least[k], lane));
  }
  block.Min(shared.least[block.thread() % BlockSelection::kNumBins], of_bin);
}

// Sorts what all threads have shared, behind a barrier; to be read behind another. The first warps
// do it, since the last have more to do meanwhile. A warp takes some bins at once, and a lane
// compares them with one.
template <class Block>
EXPERTFLOW_DEVICE void SortLeast(Block& block, BlockSelection& shared) {
  constexpr int32_t kNumBins = BlockSelection::kNumBins;
  constexpr int32_t kAtOnce = 4;
  const int32_t lane = block.thread() % Block::kWarpSize;
  const int32_t num_warps = block.num_threads() / Block::kWarpSize;
  const int32_t warp = block.thread() / Block::kWarpSize;
  EXPERTFLOW_NO_UNROLL
  for (int32_t first = kAtOnce * warp; first < kNumBins; first += kAtOnce * num_warps) {
    uint32_t least[kAtOnce];
    int32_t place[kAtOnce] = {};
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; ++k) least[k] = shared.least[first + k];
    EXPERTFLOW_UNROLL
    for (int32_t i = 0; i < kNumBins; i += Block::kWarpSize) {
      const int32_t bin = i + lane;
      const uint32_t of_bin = shared.least[bin];
      EXPERTFLOW_UNROLL
      for (int32_t k = 0; k < kAtOnce; ++k) {
        const bool is_before = (of_bin < least[k]) | ((of_bin == least[k]) & (bin < first + k));
        place[k] += CountBits(block.Ballot(is_before));
      }
    }
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kAtOnce; ++k) {
      if (lane == k) shared.sorted[place[k]] = least[k];
    }
  }
}

// Puts the listed candidates' places among the first `wanted` into `victims`, and the last of them
// into `last`; a warp for each candidate, with whose lanes it compares the list, which they read
// once.
template <class Block>
EXPERTFLOW_DEVICE void OrderList(Block& block, const BlockSelection& shared, int32_t num_listed,
                                 int32_t wanted, BlockSelection::Victim* victims,
                                 SlotCandidate& last) {
  constexpr int32_t kPerLane = BlockSelection::kListCapacity / Block::kWarpSize;
  const int32_t lane = block.thread() % Block::kWarpSize;
  const int32_t warp = block.thread() / Block::kWarpSize;
  const int32_t num_warps = block.num_threads() / Block::kWarpSize;
  if (warp >= num_listed) return;
  SlotCandidate of_lane[size_t{kPerLane}];
  EXPERTFLOW_UNROLL
  for (int32_t k = 0; k < kPerLane; ++k) {
    const int32_t j = k * Block::kWarpSize + lane;
    of_lane[k] = shared.list[j];
    if (j >= num_listed) of_lane[k] = {kNoRank, kHighestSlot, 0};
  }
  EXPERTFLOW_NO_UNROLL
  for (int32_t i = warp; i < num_listed; i += num_warps) {
    const SlotCandidate candidate = shared.list[i];
    int32_t place = 0;
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < kPerLane; ++k) {
      place += CountBits(block.Ballot(of_lane[k] < candidate));
    }
    if (lane != 0 || place >= wanted) continue;
    victims[place] = {candidate.slot, candidate.held};
    if (place == wanted - 1) last = candidate;
  }
}

// Lists those of the thread's candidates that `kept` has bits for.
template <class Block, class Candidate>
EXPERTFLOW_DEVICE void ListKept(Block& block, BlockSelection& shared, int32_t& counter,
                                uint32_t kept, const Candidate& candidate) {
  int32_t place = block.Add(counter, CountBits(kept));
  EXPERTFLOW_NO_UNROLL
  for (; kept != 0; kept &= kept - 1) {
    if (place < BlockSelection::kListCapacity) shared.list[place] = candidate(LowestBit(kept));
    ++place;
  }
}

// One pass: the `wanted` smallest candidates, above `shared.floor` if `has_floor`, of which the
// thread's smallest has the order `least`. Returns how many there are. `parity` says which counter
// is free, and turns with every use.
template <class Block, class Source>
EXPERTFLOW_DEVICE int32_t SelectAbove(Block& block, BlockSelection& shared, Source& source,
                                      bool has_floor, uint32_t least, int32_t wanted,
                                      BlockSelection::Victim* victims, int32_t& parity) {
  constexpr int32_t kListCapacity = BlockSelection::kListCapacity;
  const uint32_t bound = Smaller(shared.sorted[wanted - 1], kNoOrder - 1);
  bool has_ceiling = false;
  for (;;) {
    int32_t& counter = shared.num_listed[parity];
    if (least <= bound) {
      source.VisitTiles([&](const uint32_t (&orders)[Source::kPerTile], const auto& candidate) {
        uint32_t kept = 0;
        EXPERTFLOW_UNROLL
        for (int32_t k = 0; k < Source::kPerTile; ++k) {
          kept |= orders[k] <= bound ? uint32_t{1} << k : 0;
        }
        if (has_floor | has_ceiling) {
          EXPERTFLOW_NO_UNROLL
          for (int32_t k = 0; k < Source::kPerTile; ++k) {
            const SlotCandidate offered = candidate(k);
            const bool is_below = has_floor & !(shared.floor < offered);
            const bool is_above = has_ceiling & (shared.ceiling < offered);
            if (is_below | is_above) kept &= ~(uint32_t{1} << k);
          }
        }
        if (kept != 0) ListKept(block, shared, counter, kept, candidate);
      });
    }
    block.Sync();
    const int32_t num_kept = counter;
    const bool is_complete = num_kept <= kListCapacity;
    parity ^= 1;
    if (block.thread() == 0) shared.num_listed[parity] = 0;
    OrderList(block, shared, is_complete ? num_kept : kListCapacity, wanted, victims,
              is_complete ? shared.floor : shared.ceiling);
    block.Sync();
    if (is_complete) return num_kept < wanted ? num_kept : wanted;
    // Too many, because of equal orders or one crowded bin: what fitted gives a lower bound.
    has_ceiling = true;
  }
}

// Shares and sorts the threads' smallest orders above `shared.floor`, for another pass. Returns the
// thread's own.
template <class Block, class Source>
EXPERTFLOW_DEVICE uint32_t SortAbove(Block& block, BlockSelection& shared, Source& source) {
  constexpr int32_t kNumBins = BlockSelection::kNumBins;
  EXPERTFLOW_NO_UNROLL
  for (int32_t i = block.thread(); i < kNumBins; i += block.num_threads()) {
    shared.least[i] = kNoOrder;
  }
  block.Sync();
  uint32_t least[Source::kPerTile];
  EXPERTFLOW_UNROLL
  for (uint32_t& order : least) order = kNoOrder;
  source.VisitTiles([&](const uint32_t (&orders)[Source::kPerTile], const auto& candidate) {
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < Source::kPerTile; ++k) {
      if (shared.floor < candidate(k)) least[k] = Smaller(least[k], orders[k]);
    }
  });
  ShareLeast(block, shared, least);
  block.Sync();
  SortLeast(block, shared);
  block.Sync();
  return Smallest(least);
}

// Fills `shared.victims` with the slots of the `count` smallest candidates, in order, and returns
// how many there are; `count` is at least 1. `least` is the thread's smallest order. Before, the
// orders of some candidates, best of all, have been shared with ShareLeast and SortLeast, and
// `shared.num_listed` is 0. All threads may read the result.
template <class Block, class Source>
EXPERTFLOW_DEVICE int32_t SelectSmallest(Block& block, BlockSelection& shared, Source& source,
                                         uint32_t least, int32_t count) {
  int32_t parity = 0;
  int32_t num_found = 0;
  for (;;) {
    const int32_t rest = count - num_found;
    const int32_t wanted = rest < BlockSelection::kNumBins ? rest : BlockSelection::kNumBins;
    const int32_t found = SelectAbove(block, shared, source, num_found > 0, least, wanted,
                                      shared.victims + num_found, parity);
    num_found += found;
    if (found < wanted || num_found == count) return num_found;
    least = SortAbove(block, shared, source);
  }
}

}  // namespace expertflow
