#include "core/simulation/virtual_transfers.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>

#include "core/expert_layout.h"

namespace expertflow {

VirtualTransfers::VirtualTransfers(SlotTable& table, Planner& planner, size_t expert_bytes,
                                   size_t chunk_bytes, size_t demand_chunk_bytes,
                                   const LinkProfile& link)
    : table_(table.view()),
      planner_(planner),
      expert_bytes_(expert_bytes),
      queue_(table.view().num_slots, AlignUp(chunk_bytes, kSlotAlignment), kMaxChunksInFlight,
             AlignUp(demand_chunk_bytes, kSlotAlignment)) {
  set_link(link);
  copies_.reserve(kMaxChunksInFlight);
}

void VirtualTransfers::set_link(const LinkProfile& link) {
  if (!(link.bytes_per_second > 0.0) || link.latency_ns < 0) {
    throw std::invalid_argument("a link needs a positive bandwidth and no negative latency");
  }
  link_ = link;
}

void VirtualTransfers::Post(SlotId slot, TransferClass transfer_class, Tick needed_at,
                            int64_t now_ns) {
  AdvanceTo(now_ns);
  queue_.Post(slot, table_.slot_expert[Index(slot)], expert_bytes_, transfer_class, needed_at);
  StartCopies(now_ns);
}

int64_t VirtualTransfers::DurationNs(size_t num_bytes) const {
  return link_.latency_ns +
         std::llround(static_cast<double>(num_bytes) * 1e9 / link_.bytes_per_second);
}

void VirtualTransfers::StartCopies(int64_t now_ns) {
  while (const std::optional<Chunk> chunk = queue_.Next()) {
    planner_.Submit(chunk->slot);
    LayerStatistics& counts = planner_.statistics(ToId(table_, chunk->expert).layer);
    (queue_.IsPrefetch(chunk->slot) ? counts.prefetch_bytes : counts.demand_bytes) +=
        static_cast<int64_t>(chunk->num_bytes);
    moved_bytes_ += chunk->num_bytes;
    const int64_t begin_ns = std::max(now_ns, link_free_ns_);
    link_free_ns_ = begin_ns + DurationNs(chunk->num_bytes);
    copies_.push_back({*chunk, begin_ns, link_free_ns_});
  }
}

void VirtualTransfers::EndFirstCopy() {
  const Copy copy = copies_.front();
  copies_.erase(copies_.begin());
  bandwidth_.Record(copy.chunk.num_bytes, static_cast<double>(copy.begin_ns) * 1e-3,
                    static_cast<double>(copy.end_ns) * 1e-3);
  const TransferStatus status = queue_.Finish(copy.chunk, /*succeeded=*/true);
  if (status == TransferStatus::kDone) planner_.Publish(copy.chunk.slot);
  if (status == TransferStatus::kDropped) {
    planner_.Drop(copy.chunk.slot, queue_.copied_bytes(copy.chunk.slot));
  }
  StartCopies(copy.end_ns);
}

void VirtualTransfers::AdvanceTo(int64_t now_ns) {
  while (!copies_.empty() && copies_.front().end_ns <= now_ns) EndFirstCopy();
}

int64_t VirtualTransfers::EndOfCompute(int64_t now_ns, int64_t work_ns, double copy_slowdown) {
  if (copy_slowdown == 0.0) return now_ns + work_ns;
  const double slowed = 1.0 + copy_slowdown;
  AdvanceTo(now_ns);
  while (!copies_.empty()) {
    const int64_t copied_ns = copies_.front().end_ns;
    const int64_t end_ns = now_ns + std::llround(static_cast<double>(work_ns) * slowed);
    if (end_ns <= copied_ns) return end_ns;
    work_ns -= std::llround(static_cast<double>(copied_ns - now_ns) / slowed);
    now_ns = copied_ns;
    EndFirstCopy();
  }
  return now_ns + work_ns;
}

int64_t VirtualTransfers::WaitUntilReady(SlotId slot, int64_t now_ns) {
  AdvanceTo(now_ns);
  while (table_.slot_state[Index(slot)] != SlotState::kReady) {
    if (copies_.empty()) throw std::logic_error("nobody posted the slot that is waited for");
    now_ns = copies_.front().end_ns;
    EndFirstCopy();
  }
  return now_ns;
}

int64_t VirtualTransfers::CancelAll(int64_t now_ns) {
  for (int32_t s = 0; s < table_.num_slots; ++s) {
    const SlotId slot{s};
    if (queue_.IsIdle(slot)) continue;
    if (queue_.Cancel(slot)) planner_.Drop(slot, queue_.copied_bytes(slot));
  }
  while (!copies_.empty()) {
    now_ns = std::max(now_ns, copies_.front().end_ns);
    EndFirstCopy();
  }
  return now_ns;
}

}  // namespace expertflow
