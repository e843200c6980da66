// The transfer queue's rules said once more: every transfer is a list of the chunks still to hand
// out, and the next one is found by sorting.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "core/transfer_queue.h"

namespace expertflow {

class ReferenceQueue {
 public:
  ReferenceQueue(size_t chunk_bytes, int32_t max_chunks_in_flight)
      : chunk_bytes_(chunk_bytes), max_chunks_in_flight_(max_chunks_in_flight) {}

  void Post(SlotId slot, ExpertIndex expert, size_t num_bytes, TransferClass transfer_class,
            Tick needed_at) {
    transfers_[slot] = {.slot = slot,
                        .expert = expert,
                        .num_bytes = num_bytes,
                        .transfer_class = transfer_class,
                        .needed_at = needed_at,
                        .sequence = num_posts_++,
                        .to_hand_out = Cut(num_bytes)};
  }

  void Promote(SlotId slot, Tick needed_at) {
    Transfer& transfer = transfers_.at(slot);
    transfer.transfer_class = TransferClass::kDemand;
    transfer.needed_at = needed_at;
    transfer.restarts = transfer.chunks_out > 0;
  }

  void Reschedule(SlotId slot, Tick needed_at) { transfers_.at(slot).needed_at = needed_at; }

  bool Cancel(SlotId slot) {
    Transfer& transfer = transfers_.at(slot);
    transfer.cancelled = true;
    transfer.to_hand_out.clear();
    if (transfer.chunks_out > 0) return false;
    End(slot);
    return true;
  }

  std::optional<Chunk> Next() {
    std::vector<Transfer*> waiting;
    for (auto& [slot, transfer] : transfers_) {
      if (!transfer.to_hand_out.empty()) waiting.push_back(&transfer);
    }
    if (waiting.empty() || chunks_in_flight_ == max_chunks_in_flight_) return std::nullopt;
    std::ranges::sort(waiting, {}, [](const Transfer* t) {
      return std::tuple(t->transfer_class != TransferClass::kDemand, t->needed_at, t->sequence);
    });
    Transfer& next = *waiting.front();
    const Piece piece = next.to_hand_out.front();
    next.to_hand_out.pop_front();
    ++next.chunks_out;
    ++chunks_in_flight_;
    return Chunk{next.slot, next.expert, piece.offset_bytes, piece.num_bytes, next.transfer_class};
  }

  TransferStatus Finish(const Chunk& chunk, bool succeeded) {
    Transfer& transfer = transfers_.at(chunk.slot);
    --chunks_in_flight_;
    --transfer.chunks_out;
    if (succeeded) transfer.copied_bytes += chunk.num_bytes;
    if (!succeeded) {
      transfer.failed = true;
      transfer.to_hand_out.clear();
    }
    if (transfer.chunks_out > 0 || !transfer.to_hand_out.empty()) return TransferStatus::kInFlight;
    if (transfer.cancelled) return End(chunk.slot), TransferStatus::kDropped;
    if (!transfer.failed) return End(chunk.slot), TransferStatus::kDone;
    if (!transfer.restarts) return End(chunk.slot), TransferStatus::kFailed;
    transfer.failed = transfer.restarts = false;
    transfer.to_hand_out = Cut(transfer.num_bytes);
    return TransferStatus::kInFlight;
  }

  bool IsIdle(SlotId slot) const { return !transfers_.contains(slot); }
  bool IsCancelled(SlotId slot) const { return transfers_.at(slot).cancelled; }
  int32_t chunks_in_flight() const { return chunks_in_flight_; }

  bool IsWaitingPrefetch(SlotId slot) const {
    return IsQueuedPrefetch(slot) && transfers_.at(slot).to_hand_out.front().offset_bytes == 0;
  }

  bool IsQueuedPrefetch(SlotId slot) const {
    if (IsIdle(slot)) return false;
    const Transfer& t = transfers_.at(slot);
    return t.transfer_class == TransferClass::kPrefetch && !t.to_hand_out.empty();
  }

  size_t prefetch_bytes_until(Tick needed_at) const {
    size_t bytes = 0;
    for (const auto& [slot, t] : transfers_) {
      if (t.transfer_class != TransferClass::kPrefetch || t.needed_at > needed_at) continue;
      for (const Piece& piece : t.to_hand_out) bytes += piece.num_bytes;
    }
    return bytes;
  }

  size_t copied_bytes(SlotId slot) {
    return IsIdle(slot) ? copied_bytes_of_last_[slot] : transfers_.at(slot).copied_bytes;
  }

  size_t queued_bytes() const {
    size_t bytes = 0;
    for (const auto& [slot, transfer] : transfers_) {
      for (const Piece& piece : transfer.to_hand_out) bytes += piece.num_bytes;
    }
    return bytes;
  }

 private:
  struct Piece {
    size_t offset_bytes;
    size_t num_bytes;
  };
  struct Transfer {
    SlotId slot;
    ExpertIndex expert;
    size_t num_bytes;
    TransferClass transfer_class;
    Tick needed_at;
    int64_t sequence;
    std::deque<Piece> to_hand_out;
    int32_t chunks_out = 0;
    size_t copied_bytes = 0;
    bool cancelled = false;
    bool failed = false;
    bool restarts = false;
  };

  std::deque<Piece> Cut(size_t num_bytes) const {
    std::deque<Piece> pieces;
    for (size_t at = 0; at < num_bytes; at += chunk_bytes_) {
      pieces.push_back({at, std::min(chunk_bytes_, num_bytes - at)});
    }
    return pieces;
  }

  void End(SlotId slot) {
    copied_bytes_of_last_[slot] = transfers_.at(slot).copied_bytes;
    transfers_.erase(slot);
  }

  size_t chunk_bytes_;
  int32_t max_chunks_in_flight_;
  int32_t chunks_in_flight_ = 0;
  int64_t num_posts_ = 0;
  std::map<SlotId, Transfer> transfers_;
  std::map<SlotId, size_t> copied_bytes_of_last_;
};

}  // namespace expertflow
