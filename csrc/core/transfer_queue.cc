#include "core/transfer_queue.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace expertflow {

TransferQueue::TransferQueue(int32_t num_slots, size_t chunk_bytes, int32_t max_chunks_in_flight,
                             size_t demand_chunk_bytes)
    : chunk_bytes_(chunk_bytes),
      demand_chunk_bytes_(demand_chunk_bytes == 0 ? chunk_bytes : demand_chunk_bytes),
      max_chunks_in_flight_(max_chunks_in_flight) {
  if (chunk_bytes == 0 || max_chunks_in_flight <= 0) {
    throw std::invalid_argument(
        "a transfer queue needs a chunk size and at least one chunk in flight");
  }
  transfers_.resize(static_cast<size_t>(num_slots));
  queued_.reserve(static_cast<size_t>(num_slots));
}

void TransferQueue::Post(SlotId slot, ExpertIndex expert, size_t num_bytes,
                         TransferClass transfer_class, Tick needed_at) {
  if (!IsIdle(slot)) throw std::logic_error("a slot can have only one transfer at a time");
  Transfer& posted = transfer(slot);
  posted = Transfer{};
  posted.expert = expert;
  posted.transfer_class = transfer_class;
  posted.needed_at = needed_at;
  posted.sequence = next_sequence_++;
  posted.num_bytes = num_bytes;
  Enqueue(slot);
}

void TransferQueue::Promote(SlotId slot, Tick needed_at) {
  Transfer& promoted = transfer(slot);
  promoted.transfer_class = TransferClass::kDemand;
  promoted.restarts = promoted.chunks_out > 0;
  Reschedule(slot, needed_at);
}

void TransferQueue::Reschedule(SlotId slot, Tick needed_at) {
  Transfer& rescheduled = transfer(slot);
  rescheduled.needed_at = needed_at;
  if (rescheduled.place != kNotQueued) Restore(static_cast<size_t>(rescheduled.place));
}

bool TransferQueue::Cancel(SlotId slot) {
  Transfer& cancelled = transfer(slot);
  RemoveQueued(slot);
  cancelled.cancelled = true;
  if (cancelled.chunks_out > 0) return false;
  cancelled.expert = ExpertIndex::kNone;
  return true;
}

std::optional<Chunk> TransferQueue::Next() {
  if (!HasNext()) return std::nullopt;
  const SlotId slot = queued_.front();
  Transfer& next = transfer(slot);
  const size_t limit = IsPrefetch(slot) ? chunk_bytes_ : demand_chunk_bytes_;
  const size_t num_bytes = std::min(limit, next.num_bytes - next.next_offset);
  const Chunk chunk{slot, next.expert, next.next_offset, num_bytes, next.transfer_class};
  next.next_offset += num_bytes;
  ++next.chunks_out;
  ++chunks_in_flight_;
  if (next.next_offset == next.num_bytes) RemoveQueued(slot);
  return chunk;
}

TransferStatus TransferQueue::Finish(const Chunk& chunk, bool succeeded) {
  Transfer& finished = transfer(chunk.slot);
  --chunks_in_flight_;
  --finished.chunks_out;
  if (succeeded) {
    finished.copied_bytes += chunk.num_bytes;
  } else if (!finished.failed) {
    finished.failed = true;
    RemoveQueued(chunk.slot);
  }
  const bool is_over =
      finished.cancelled || finished.failed || finished.next_offset == finished.num_bytes;
  if (finished.chunks_out > 0 || !is_over) return TransferStatus::kInFlight;
  if (finished.failed && finished.restarts && !finished.cancelled) {
    finished.failed = finished.restarts = false;
    finished.next_offset = 0;
    Enqueue(chunk.slot);
    return TransferStatus::kInFlight;
  }
  finished.expert = ExpertIndex::kNone;
  if (finished.cancelled) return TransferStatus::kDropped;
  return finished.failed ? TransferStatus::kFailed : TransferStatus::kDone;
}

size_t TransferQueue::queued_bytes() const {
  size_t bytes = 0;
  for (const SlotId slot : queued_) bytes += transfer(slot).num_bytes - transfer(slot).next_offset;
  return bytes;
}

size_t TransferQueue::prefetch_bytes_until(Tick needed_at) const {
  size_t bytes = 0;
  for (const SlotId slot : queued_) {
    const Transfer& t = transfer(slot);
    if (t.transfer_class == TransferClass::kPrefetch && t.needed_at <= needed_at) {
      bytes += t.num_bytes - t.next_offset;
    }
  }
  return bytes;
}

bool TransferQueue::Precedes(SlotId a, SlotId b) const {
  const auto order = [this](SlotId slot) {
    const Transfer& t = transfer(slot);
    return std::tuple(t.transfer_class, t.needed_at, t.sequence);
  };
  return order(a) < order(b);
}

void TransferQueue::Enqueue(SlotId slot) {
  queued_.push_back(slot);
  Restore(queued_.size() - 1);
}

void TransferQueue::RemoveQueued(SlotId slot) {
  const int32_t place = std::exchange(transfer(slot).place, kNotQueued);
  if (place == kNotQueued) return;
  const SlotId last = queued_.back();
  queued_.pop_back();
  if (last == slot) return;
  queued_[static_cast<size_t>(place)] = last;
  Restore(static_cast<size_t>(place));
}

void TransferQueue::Place(size_t place, SlotId slot) {
  queued_[place] = slot;
  transfer(slot).place = static_cast<int32_t>(place);
}

void TransferQueue::Restore(size_t place) {
  const SlotId slot = queued_[place];
  for (; place > 0; place = (place - 1) / 2) {
    const SlotId parent = queued_[(place - 1) / 2];
    if (!Precedes(slot, parent)) break;
    Place(place, parent);
  }
  for (size_t child = 2 * place + 1; child < queued_.size(); child = 2 * place + 1) {
    if (child + 1 < queued_.size() && Precedes(queued_[child + 1], queued_[child])) ++child;
    if (!Precedes(queued_[child], slot)) break;
    Place(place, queued_[child]);
    place = child;
  }
  Place(place, slot);
}

}  // namespace expertflow
