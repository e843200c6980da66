#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/ids.h"
#include "core/slot_table.h"
#include "core/transfer_queue.h"

namespace expertflow {

// The prefetches that were posted and of which bytes are left to hand out. A later prediction is a
// better one, so with each the backlog is decided anew, beside what is foreseen now:
//
//   Reopen(tick)                      as if nothing were queued
//   for each that is worth its bytes, behind bytes_until(distance):
//     Keep(slot, distance)            it was posted already
//     Admit(distance)                 it is new
//   EndUndecided(give_up)             what was not kept
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

  // Queued bytes, demands' too, that no decision takes back or puts behind others: all but what has
  // not begun, and what was put behind already.
  size_t settled_bytes() const;

  void Reopen(Tick now);
  // Whether the slot's prefetch, needed at that tick, is of the backlog and has not been kept.
  bool IsUndecided(SlotId slot, Tick needed_at) const {
    return undecided_[static_cast<size_t>(Index(slot))] == needed_at;
  }
  void Keep(SlotId slot, int32_t distance);
  void Admit(int32_t distance);

  // What prefetches that were kept or admitted, or that are not decided here, have still to bring,
  // those that are needed at most `distance` layers from now.
  size_t bytes_until(int32_t distance) const { return bytes_[static_cast<size_t>(distance)]; }

  // Calls give_up(slot, the tick it was needed at) for each that is undecided, and forgets it if
  // that returns true; else it goes on behind all others (TransferQueue::Reschedule).
  template <class GiveUp>
  void EndUndecided(const GiveUp& give_up) {
    std::erase_if(posted_, [&](const Posted& posted) {
      Tick& undecided = undecided_[static_cast<size_t>(Index(posted.slot))];
      if (undecided == kNever) return false;
      undecided = kNever;
      return give_up(posted.slot, posted.needed_at);
    });
  }

 private:
  struct Posted {
    SlotId slot;
    uint32_t generation;  // the slot may have been given to another expert since
    Tick needed_at;
  };

  bool IsQueued(const Posted& posted) const;
  bool IsBehind(const Posted& posted) const {
    return queue_.needed_at(posted.slot) > posted.needed_at;
  }
  void AddBytes(size_t num_bytes, int32_t distance);

  SlotTableView table_;
  const TransferQueue& queue_;
  size_t expert_bytes_;
  std::vector<Posted> posted_;   // [num_slots] at most
  std::vector<Tick> undecided_;  // [num_slots] when it is needed, or kNever
  std::array<size_t, kMaxDistance + 1> bytes_{};
};

}  // namespace expertflow
