#include "core/prefetch_backlog.h"

#include <algorithm>

namespace expertflow {

PrefetchBacklog::PrefetchBacklog(const SlotTableView& table, const TransferQueue& queue,
                                 size_t expert_bytes)
    : table_(table),
      queue_(queue),
      expert_bytes_(expert_bytes),
      undecided_(static_cast<size_t>(table.num_slots), kNever) {
  posted_.reserve(static_cast<size_t>(table.num_slots));
}

void PrefetchBacklog::Add(SlotId slot, Tick needed_at) {
  posted_.push_back({slot, table_.slot_generation[Index(slot)], needed_at});
}

bool PrefetchBacklog::IsQueued(const Posted& posted) const {
  return queue_.IsQueuedPrefetch(posted.slot) &&
         table_.slot_generation[Index(posted.slot)] == posted.generation;
}

size_t PrefetchBacklog::settled_bytes() const {
  size_t bytes = queue_.queued_bytes();
  for (const Posted& posted : posted_) {
    if (!IsQueued(posted)) continue;
    const bool is_settled = !queue_.IsWaitingPrefetch(posted.slot) && !IsBehind(posted);
    if (!is_settled) bytes -= queue_.left_bytes(posted.slot);
  }
  return bytes;
}

void PrefetchBacklog::Reopen(Tick now) {
  std::erase_if(posted_, [this](const Posted& posted) { return !IsQueued(posted); });
  for (int32_t d = 0; d <= kMaxDistance; ++d) {
    bytes_[static_cast<size_t>(d)] = queue_.prefetch_bytes_until(now + d);
  }
  for (const Posted& posted : posted_) {
    undecided_[static_cast<size_t>(Index(posted.slot))] = posted.needed_at;
    const auto distance = std::max<Tick>(queue_.needed_at(posted.slot) - now, 0);
    const size_t left_bytes = queue_.left_bytes(posted.slot);
    for (Tick d = distance; d <= kMaxDistance; ++d) bytes_[static_cast<size_t>(d)] -= left_bytes;
  }
}

void PrefetchBacklog::Keep(SlotId slot, int32_t distance) {
  undecided_[static_cast<size_t>(Index(slot))] = kNever;
  AddBytes(queue_.left_bytes(slot), distance);
}

void PrefetchBacklog::Admit(int32_t distance) { AddBytes(expert_bytes_, distance); }

void PrefetchBacklog::AddBytes(size_t num_bytes, int32_t distance) {
  for (int32_t d = distance; d <= kMaxDistance; ++d) bytes_[static_cast<size_t>(d)] += num_bytes;
}

}  // namespace expertflow
