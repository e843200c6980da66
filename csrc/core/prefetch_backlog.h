#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/ids.h"
#include "core/slot_table.h"
#include "core/transfer_queue.h"

namespace expertflow {

// The prefetches that were posted and wait: no byte of them was handed out yet. A later prediction
// is a better one, so with each the backlog is decided anew, beside what is foreseen now:
//
//   Reopen(tick)                      as if nothing waited
//   for each that is worth its bytes, behind bytes_until(distance):
//     Keep(slot, distance)            it waits already
//     Admit(distance)                 it is new
//   TakeUndecided(take_back)          what was not kept
//   Add(slot, needed_at)              for each that was admitted, once it is posted
//
// Allocates nothing after construction.
class PrefetchBacklog {
 public:
  static constexpr int32_t kMaxDistance = 8;

  // Keeps the reference to the queue. All transfers are of `expert_bytes`.
  PrefetchBacklog(const SlotTableView& table, const TransferQueue& queue, size_t expert_bytes);

  // `needed_at` is at most kMaxDistance ticks from now.
  void Add(SlotId slot, Tick needed_at);

  // Queued bytes, demands' too, that no decision takes back: all but what waits.
  size_t settled_bytes() const;

  void Reopen(Tick now);
  // Whether the slot's prefetch, needed at that tick, waits and has not been kept.
  bool IsUndecided(SlotId slot, Tick needed_at) const {
    return undecided_[static_cast<size_t>(Index(slot))] == needed_at;
  }
  void Keep(SlotId slot, int32_t distance);
  void Admit(int32_t distance);

  // What prefetches that have begun, or were kept or admitted, have still to bring, those that are
  // needed at most `distance` layers from now.
  size_t bytes_until(int32_t distance) const { return bytes_[static_cast<size_t>(distance)]; }

  // Calls take_back(slot) for each that is undecided, and forgets it.
  template <class TakeBack>
  void TakeUndecided(const TakeBack& take_back) {
    std::erase_if(waiting_, [&](const Waiting& waiting) {
      Tick& undecided = undecided_[static_cast<size_t>(Index(waiting.slot))];
      if (undecided == kNever) return false;
      undecided = kNever;
      take_back(waiting.slot);
      return true;
    });
  }

 private:
  struct Waiting {
    SlotId slot;
    uint32_t generation;  // the slot may have been given to another expert since
    Tick needed_at;
  };

  bool StillWaits(const Waiting& waiting) const;

  SlotTableView table_;
  const TransferQueue& queue_;
  size_t expert_bytes_;
  std::vector<Waiting> waiting_;  // [num_slots] at most
  std::vector<Tick> undecided_;   // [num_slots] when it is needed, or kNever
  std::array<size_t, kMaxDistance + 1> bytes_{};
};

}  // namespace expertflow
