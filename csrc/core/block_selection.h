#pragma once

#include <cstdint>
#include <limits>

#include "core/host_device.h"
#include "core/planning.h"

// The victims of a plan, found by a block of threads: what Planner::Scan is on the host.
//
// Every thread offers the candidates of its own slots. The threads are dealt out to eight classes;
// the largest of the classes' smallest ranks is a bound that at least eight candidates keep, and
// not many more. Those that keep it go into a short list, where each counts how many are smaller
// than itself, which is its place in the order. More than eight victims take several passes.
//
// A `Block` is what a CUDA block gives its threads: thread(), num_threads() (whole warps of 32),
// Sync(), ShuffleXor(value, mask) within a warp, and Add(counter, amount) for 32 and 64 bits, which
// is atomic and returns the value before. A `Source` has Visit(f), which calls f(candidate) for
// every candidate of the calling thread.

namespace expertflow {

constexpr int32_t kWarpSize = 32;
constexpr int32_t kMaxBlockThreads = 1024;
constexpr int32_t kMaxBlockVictims = 512;
constexpr int64_t kNoRank = std::numeric_limits<int64_t>::max();  // above every rank
constexpr int64_t kLowestRank = std::numeric_limits<int64_t>::min();
constexpr int32_t kHighestSlot = std::numeric_limits<int32_t>::max();

// Lies in the shared memory of the block.
struct BlockSelection {
  static constexpr int32_t kNumClasses = 8;  // and victims of one pass
  static constexpr int32_t kListCapacity = 64;

  int64_t class_min[kMaxBlockThreads / kWarpSize * kNumClasses];  // [warps, classes]
  Candidate list[kListCapacity];
  int32_t num_listed[2];  // of this list and of the next; 0 before the first pass
  Candidate last;         // the last victim of the pass
  int32_t victims[kMaxBlockVictims];
};

// A rank that at least kNumClasses of the threads' smallest ranks `own_min` do not exceed, or
// kNoRank if some class has no candidate at all.
template <class Block>
EXPERTFLOW_DEVICE int64_t BoundOfRanks(Block& block, BlockSelection& shared, int64_t own_min) {
  constexpr int32_t kNumClasses = BlockSelection::kNumClasses;
  const auto lower = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const auto upper = [](int64_t a, int64_t b) { return a < b ? b : a; };
  const int32_t warp = block.thread() / kWarpSize;
  const int32_t lane = block.thread() % kWarpSize;
  int64_t rank = own_min;
  for (int32_t mask = kNumClasses; mask < kWarpSize; mask *= 2) {
    rank = lower(rank, block.ShuffleXor(rank, mask));
  }
  if (lane < kNumClasses) shared.class_min[warp * kNumClasses + lane] = rank;
  block.Sync();
  // Every warp for itself: cheaper than one warp and another barrier.
  rank = kNoRank;
  const int32_t num_entries = block.num_threads() / kWarpSize * kNumClasses;
  for (int32_t first = lane; first < num_entries; first += 4 * kWarpSize) {
    EXPERTFLOW_UNROLL
    for (int32_t k = 0; k < 4; ++k) {
      const int32_t i = first + k * kWarpSize;
      rank = lower(rank, i < num_entries ? shared.class_min[i] : kNoRank);
    }
  }
  for (int32_t mask = kNumClasses; mask < kWarpSize; mask *= 2) {
    rank = lower(rank, block.ShuffleXor(rank, mask));
  }
  for (int32_t mask = 1; mask < kNumClasses; mask *= 2) {
    rank = upper(rank, block.ShuffleXor(rank, mask));
  }
  return rank;
}

// Puts the listed candidates' places among the first `wanted` into `victims`.
template <class Block>
EXPERTFLOW_DEVICE void OrderList(Block& block, BlockSelection& shared, int32_t num_listed,
                                 int32_t wanted, int32_t* victims) {
  for (int32_t i = block.thread(); i < num_listed; i += block.num_threads()) {
    const Candidate candidate = shared.list[i];
    int32_t place = 0;
    for (int32_t j = 0; j < num_listed; ++j) place += shared.list[j] < candidate ? 1 : 0;
    if (place < wanted) victims[place] = candidate.slot;
    if (place == wanted - 1) shared.last = candidate;
  }
}

// One pass: the `wanted` smallest candidates above `floor`. Returns how many there are. `parity`
// says which counter is free, and turns with every use.
template <class Block, class Source>
EXPERTFLOW_DEVICE int32_t SelectAbove(Block& block, BlockSelection& shared, Source& source,
                                      Candidate floor, int32_t wanted, int32_t* victims,
                                      int32_t& parity) {
  constexpr int32_t kListCapacity = BlockSelection::kListCapacity;
  int64_t own_min = kNoRank;
  source.Visit([&](const Candidate& candidate) {
    if (floor < candidate && candidate.rank < own_min) own_min = candidate.rank;
  });
  Candidate bound{BoundOfRanks(block, shared, own_min), kHighestSlot};
  for (;;) {
    int32_t& counter = shared.num_listed[parity];
    if (own_min != kNoRank && own_min <= bound.rank) {
      source.Visit([&](const Candidate& candidate) {
        if (!(floor < candidate) || bound < candidate) return;
        const int32_t place = block.Add(counter, 1);
        if (place < kListCapacity) shared.list[place] = candidate;
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
    // Too many, because of equal ranks or one crowded class: what fitted gives a lower bound.
    bound = shared.last;
  }
}

// Fills `shared.victims` with the slots of the `count` smallest candidates, in order, and returns
// how many there are. `shared.num_listed` must be 0 for all threads. All threads may read the
// result.
template <class Block, class Source>
EXPERTFLOW_DEVICE int32_t SelectSmallest(Block& block, BlockSelection& shared, Source& source,
                                         int32_t count) {
  Candidate floor{kLowestRank, -1};
  int32_t parity = 0;
  int32_t num_found = 0;
  while (num_found < count) {
    const int32_t rest = count - num_found;
    const int32_t wanted =
        rest < BlockSelection::kNumClasses ? rest : int32_t{BlockSelection::kNumClasses};
    const int32_t found =
        SelectAbove(block, shared, source, floor, wanted, shared.victims + num_found, parity);
    num_found += found;
    if (found < wanted) break;
    floor = shared.last;
  }
  return num_found;
}

}  // namespace expertflow
