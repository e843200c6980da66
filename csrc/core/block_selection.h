#pragma once

#include <cstddef>
#include <cstdint>

#include "core/host_device.h"
#include "core/slot_order.h"

// The victims of a plan, found by a block of threads: what Planner::Scan is on the host.
//
// Every thread offers the candidates of its own slots. They are dealt to bins; the n-th smallest of
// the bins' minima is a bound that at least n candidates keep, and not many more. Those that keep
// it go into a short list, where each counts how many are smaller than itself, which is its place
// in the order. More victims than there are bins take several passes. Until the list, ranks are
// compared by 32 bits of theirs (OrderOf); the list is exact.
//
// A `Block` is what a CUDA block gives its threads: kWarpSize, thread(), num_threads() (whole
// warps), Sync(), of a warp Ballot(flag) and OfLane(value, lane), and, atomic, Min(value, other)
// and Add(counter, amount), which returns the value before. A `Source` has the calling thread's
// candidates, some at once: VisitTiles(f) calls f(orders [kPerTile], candidate), where candidate(k)
// is the SlotCandidate of the k-th order; kNoOrder is none.

namespace expertflow {

constexpr int32_t kMaxBlockVictims = 512;

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
template <class Source, class Block, class Candidate>
EXPERTFLOW_DEVICE void ListKept(Block& block, BlockSelection& shared, int32_t& counter,
                                uint32_t kept, const Candidate& candidate) {
  if (kept == 0) return;
  int32_t place = block.Add(counter, CountBits(kept));
  EXPERTFLOW_UNROLL
  for (int32_t k = 0; k < Source::kPerTile; ++k) {
    if ((kept >> k & 1) == 0) continue;
    if (place < BlockSelection::kListCapacity) shared.list[place] = candidate(k);
    ++place;
  }
}

// What of the limits in `shared` there is.
struct SelectionLimits {
  bool has_floor = false;
  bool has_ceiling = false;
};

// Lists the candidates that keep the bound of the `wanted` smallest and, if kIsLimited, the limits
// in `shared`, of which the thread's smallest has the order `least`, and puts those that are listed
// in order. Returns how many there are, which may be more than the list holds. `parity` says which
// counter is free, and turns with every use.
template <bool kIsLimited, class Block, class Source>
EXPERTFLOW_DEVICE int32_t ListSmallest(Block& block, BlockSelection& shared, Source& source,
                                       SelectionLimits limits, uint32_t least, int32_t wanted,
                                       BlockSelection::Victim* victims, int32_t& parity) {
  constexpr int32_t kListCapacity = BlockSelection::kListCapacity;
  const uint32_t bound = Smaller(shared.sorted[wanted - 1], kNoOrder - 1);
  int32_t& counter = shared.num_listed[parity];
  if (least <= bound) {
    source.VisitTiles([&](const uint32_t (&orders)[Source::kPerTile], const auto& candidate) {
      uint32_t kept = 0;
      EXPERTFLOW_UNROLL
      for (int32_t k = 0; k < Source::kPerTile; ++k) {
        kept |= orders[k] <= bound ? uint32_t{1} << k : 0;
      }
      if constexpr (kIsLimited) {
        EXPERTFLOW_UNROLL
        for (int32_t k = 0; k < Source::kPerTile; ++k) {
          const SlotCandidate offered = candidate(k);
          const bool is_below = limits.has_floor & !(shared.floor < offered);
          const bool is_above = limits.has_ceiling & (shared.ceiling < offered);
          if (is_below | is_above) kept &= ~(uint32_t{1} << k);
        }
      }
      ListKept<Source>(block, shared, counter, kept, candidate);
    });
  }
  block.Sync();
  const int32_t num_kept = counter;
  const bool fits = num_kept <= kListCapacity;
  parity ^= 1;
  if (block.thread() == 0) shared.num_listed[parity] = 0;
  OrderList(block, shared, fits ? num_kept : kListCapacity, wanted, victims,
            fits ? shared.floor : shared.ceiling);
  block.Sync();
  return num_kept;
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

// Goes on where one list was not enough: of the `wanted` victims that come first, `num_kept` have
// been listed, or more than fitted.
template <class Block, class Source>
EXPERTFLOW_DEVICE int32_t SelectMore(Block& block, BlockSelection& shared, Source& source,
                                     uint32_t least, int32_t count, int32_t wanted,
                                     int32_t num_kept, int32_t& parity) {
  constexpr int32_t kNumBins = BlockSelection::kNumBins;
  SelectionLimits limits;
  int32_t num_found = 0;
  EXPERTFLOW_NO_UNROLL
  for (;;) {
    if (num_kept > BlockSelection::kListCapacity) {
      // Because of equal orders or one crowded bin: what fitted gives a lower bound.
      limits.has_ceiling = true;
    } else {
      num_found += num_kept < wanted ? num_kept : wanted;
      if (num_kept < wanted || num_found == count) return num_found;
      limits = {.has_floor = true};
      least = SortAbove(block, shared, source);
      wanted = count - num_found < kNumBins ? count - num_found : kNumBins;
    }
    num_kept = ListSmallest<true>(block, shared, source, limits, least, wanted,
                                  shared.victims + num_found, parity);
  }
}

// Fills `shared.victims` with the slots of the `count` smallest candidates, in order, and returns
// how many there are; `count` is at least 1. `least` is the thread's smallest order. Before, the
// orders of some candidates, best of all, have been shared with ShareLeast and SortLeast, and
// `shared.num_listed` is 0. All threads may read the result.
//
// Nearly every plan needs one list only. It stands outside the loop of the others: out of that, the
// compiler hoists what only their limits need.
template <class Block, class Source>
EXPERTFLOW_DEVICE int32_t SelectSmallest(Block& block, BlockSelection& shared, Source& source,
                                         uint32_t least, int32_t count) {
  constexpr int32_t kNumBins = BlockSelection::kNumBins;
  int32_t parity = 0;
  const int32_t wanted = count < kNumBins ? count : kNumBins;
  const int32_t num_kept =
      ListSmallest<false>(block, shared, source, {}, least, wanted, shared.victims, parity);
  if (num_kept < wanted) return num_kept;
  if (num_kept <= BlockSelection::kListCapacity && wanted == count) return count;
  return SelectMore(block, shared, source, least, count, wanted, num_kept, parity);
}

}  // namespace expertflow
