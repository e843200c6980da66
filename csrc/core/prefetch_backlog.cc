#include "core/prefetch_backlog.h"

#include <algorithm>

namespace expertflow {

PrefetchBacklog::PrefetchBacklog(const SlotTableView& table, const TransferQueue& queue,
                                 size_t expert_bytes)
    : table_(table),
      queue_(queue),
      expert_bytes_(expert_bytes),
      undecided_(static_cast<size_t>(table.num_slots), kNever) {
  waiting_.reserve(static_cast<size_t>(table.num_slots));
}

void PrefetchBacklog::Add(SlotId slot, Tick needed_at) {
  waiting_.push_back({slot, table_.slot_generation[Index(slot)], needed_at});
}

bool PrefetchBacklog::StillWaits(const Waiting& waiting) const {
  return queue_.IsWaitingPrefetch(waiting.slot) &&
         table_.slot_generation[Index(waiting.slot)] == waiting.generation;
}

size_t PrefetchBacklog::settled_bytes() const {
  const auto num_waiting = static_cast<size_t>(std::ranges::count_if(
      waiting_, [this](const Waiting& waiting) { return StillWaits(waiting); }));
  return queue_.queued_bytes() - num_waiting * expert_bytes_;
}

void PrefetchBacklog::Reopen(Tick now) {
  std::erase_if(waiting_, [this](const Waiting& waiting) { return !StillWaits(waiting); });
  for (int32_t d = 0; d <= kMaxDistance; ++d) {
    bytes_[static_cast<size_t>(d)] = queue_.prefetch_bytes_until(now + d);
  }
  for (const Waiting& waiting : waiting_) {
    undecided_[static_cast<size_t>(Index(waiting.slot))] = waiting.needed_at;
    const auto distance = std::max<Tick>(waiting.needed_at - now, 0);
    for (Tick d = distance; d <= kMaxDistance; ++d) bytes_[static_cast<size_t>(d)] -= expert_bytes_;
  }
}

void PrefetchBacklog::Keep(SlotId slot, int32_t distance) {
  undecided_[static_cast<size_t>(Index(slot))] = kNever;
  Admit(distance);
}

void PrefetchBacklog::Admit(int32_t distance) {
  for (int32_t d = distance; d <= kMaxDistance; ++d)
    bytes_[static_cast<size_t>(d)] += expert_bytes_;
}

}  // namespace expertflow
