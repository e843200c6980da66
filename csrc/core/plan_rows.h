#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "core/ids.h"

// The rows of a plan that a block of threads makes: which of the routed ids are hits, late hits and
// misses, and their order.

namespace expertflow {

// Where the expert of a routed id is: 2 * slot + (1 in flight), or one of the numbers below 0.
struct Residence {
  static constexpr int32_t kMissing = -1;
  static constexpr int32_t kRepeated = -2;  // was there before, and is no row

  EXPERTFLOW_HD static int32_t Of(SlotId slot, bool in_flight) {
    return 2 * Index(slot) + (in_flight ? 1 : 0);
  }
  EXPERTFLOW_HD static bool InFlight(int32_t residence) {
    return residence >= 0 && residence % 2 == 1;
  }
  EXPERTFLOW_HD static SlotId Slot(int32_t residence) { return static_cast<SlotId>(residence / 2); }
};

struct RowCounts {
  int32_t hits = 0;
  int32_t loading = 0;
  int32_t misses = 0;

  EXPERTFLOW_HD int32_t rows() const { return hits + loading + misses; }
};

struct CountedRows {
  RowCounts total;
  // Of the thread's own id; a thread without one has a repeated one.
  int32_t own = Residence::kRepeated;
  RowCounts before;  // in the order of the ids
};

// Counts the rows of `residence` [num_ids], behind a barrier. Every warp for itself: cheaper than
// one warp and another barrier.
template <class Block>
EXPERTFLOW_DEVICE void CountRows(Block& block, const int32_t* residence, int32_t num_ids,
                                 CountedRows& counted) {
  const int32_t lane = block.thread() % Block::kWarpSize;
  const uint32_t lower_lanes = (uint32_t{1} << lane) - 1;
  RowCounts total;
  EXPERTFLOW_NO_UNROLL
  for (int32_t first = 0; first < num_ids; first += Block::kWarpSize) {
    const int32_t place = first + lane;
    const int32_t of_id = place < num_ids ? residence[place] : Residence::kRepeated;
    const bool is_loading = Residence::InFlight(of_id);
    const uint32_t hits = block.Ballot(of_id >= 0 && !is_loading);
    const uint32_t loading = block.Ballot(is_loading);
    const uint32_t misses = block.Ballot(of_id == Residence::kMissing);
    if (place == block.thread()) {
      counted.own = of_id;
      counted.before = {total.hits + CountBits(hits & lower_lanes),
                        total.loading + CountBits(loading & lower_lanes),
                        total.misses + CountBits(misses & lower_lanes)};
    }
    total.hits += CountBits(hits);
    total.loading += CountBits(loading);
    total.misses += CountBits(misses);
  }
  counted.total = total;
}

}  // namespace expertflow
