#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/ids.h"

namespace expertflow {

enum class TransferClass : uint8_t { kDemand, kPrefetch };

// A part of a transfer, the unit that is copied without interruption.
struct Chunk {
  SlotId slot;
  ExpertIndex expert;
  size_t offset_bytes;
  size_t num_bytes;
  TransferClass transfer_class;  // when it was handed out
};

// How a transfer stands once a chunk of it has ended.
enum class TransferStatus : uint8_t {
  kInFlight,
  kDone,
  kDropped,  // cancelled, and its last submitted chunk has ended
  kFailed,   // a chunk failed, and its last submitted chunk has ended
};

// Which chunk to copy next: demand before prefetch, then the earlier need, then the earlier post. A
// slot has at most one transfer. Decides only: the caller copies, and serialises the calls.
// Allocates nothing after construction.
class TransferQueue {
 public:
  // At most `max_chunks_in_flight` chunks are out at a time, so that a demand waits for no more
  // than those. Nothing overtakes a demand but an earlier one, so its chunks may be larger:
  // `demand_chunk_bytes`, or `chunk_bytes` if that is 0. Throws std::invalid_argument for a chunk
  // size or a limit of 0.
  TransferQueue(int32_t num_slots, size_t chunk_bytes, int32_t max_chunks_in_flight,
                size_t demand_chunk_bytes = 0);

  // Queues `num_bytes` into `slot`, which must be idle. `needed_at` is the tick of the plan that
  // will need it.
  void Post(SlotId slot, ExpertIndex expert, size_t num_bytes, TransferClass transfer_class,
            Tick needed_at);

  // A queued or running transfer has become a demand. If one of the chunks that were out before
  // fails, or has failed already, the transfer starts anew once: nobody was to see that failure.
  void Promote(SlotId slot, Tick needed_at);

  // A queued or running transfer is needed at another time, and gets another place.
  void Reschedule(SlotId slot, Tick needed_at);

  // Takes a transfer back. True: it is gone. False: chunks of it are out; Finish will report
  // kDropped for the last, whether they fail or not.
  bool Cancel(SlotId slot);

  // Nothing is queued and nothing is out.
  bool empty() const { return queued_.empty() && chunks_in_flight_ == 0; }
  bool HasNext() const { return !queued_.empty() && chunks_in_flight_ < max_chunks_in_flight_; }
  bool NextIsDemand() const { return HasNext() && !IsPrefetch(queued_.front()); }

  // The next chunk to copy, or nothing if there is none or the limit is reached.
  std::optional<Chunk> Next();

  // A chunk from Next has been copied, or could not be. Anything but kInFlight ends the transfer:
  // the slot is idle.
  TransferStatus Finish(const Chunk& chunk, bool succeeded);

  bool IsIdle(SlotId slot) const { return transfer(slot).expert == ExpertIndex::kNone; }
  // Of the slot's transfer, or of its last one if it is idle; all that were copied, also in vain.
  size_t copied_bytes(SlotId slot) const { return transfer(slot).copied_bytes; }
  bool IsPrefetch(SlotId slot) const {
    return transfer(slot).transfer_class == TransferClass::kPrefetch;
  }
  // A prefetch of which something was not handed out yet: left_bytes.
  bool IsQueuedPrefetch(SlotId slot) const {
    return IsPrefetch(slot) && transfer(slot).place != kNotQueued;
  }
  // A prefetch of which nothing was handed out: Cancel takes it back without a trace.
  bool IsWaitingPrefetch(SlotId slot) const {
    return IsQueuedPrefetch(slot) && transfer(slot).next_offset == 0;
  }
  size_t left_bytes(SlotId slot) const {
    return transfer(slot).num_bytes - transfer(slot).next_offset;
  }
  Tick needed_at(SlotId slot) const { return transfer(slot).needed_at; }
  bool HasChunksOut(SlotId slot) const { return transfer(slot).chunks_out > 0; }
  int32_t chunks_in_flight() const { return chunks_in_flight_; }
  size_t chunk_bytes() const { return chunk_bytes_; }
  size_t demand_chunk_bytes() const { return demand_chunk_bytes_; }
  size_t queued_bytes() const;  // not yet handed out
  // Of these, prefetches that are needed at `needed_at` or before.
  size_t prefetch_bytes_until(Tick needed_at) const;

 private:
  struct Transfer {
    ExpertIndex expert = ExpertIndex::kNone;
    TransferClass transfer_class = TransferClass::kDemand;
    bool cancelled = false;
    bool failed = false;
    bool restarts = false;  // instead of failing, once: it was promoted while chunks were out
    int32_t chunks_out = 0;
    int32_t place = kNotQueued;  // in queued_
    Tick needed_at = 0;
    int64_t sequence = 0;
    size_t num_bytes = 0;
    size_t next_offset = 0;
    size_t copied_bytes = 0;
  };

  static constexpr int32_t kNotQueued = -1;

  Transfer& transfer(SlotId slot) { return transfers_[static_cast<size_t>(Index(slot))]; }
  const Transfer& transfer(SlotId slot) const {
    return transfers_[static_cast<size_t>(Index(slot))];
  }
  bool Precedes(SlotId a, SlotId b) const;
  void Enqueue(SlotId slot);
  void RemoveQueued(SlotId slot);
  void Place(size_t place, SlotId slot);
  // Moves the transfer at `place`, whose rank may have changed, to where it belongs in the heap.
  void Restore(size_t place);

  size_t chunk_bytes_;
  size_t demand_chunk_bytes_;
  int32_t max_chunks_in_flight_;
  int32_t chunks_in_flight_ = 0;
  int64_t next_sequence_ = 0;
  std::vector<Transfer> transfers_;  // [num_slots]
  std::vector<SlotId> queued_;       // transfers with bytes to hand out, a heap: the next one first
};

}  // namespace expertflow
