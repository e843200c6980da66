#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "core/expert_source.h"
#include "core/ids.h"
#include "core/transfer_queue.h"
#include "cuda/event.h"
#include "cuda/pinned_memory.h"
#include "cuda/pinned_pool.h"
#include "cuda/shared_control.h"
#include "cuda/slot_uses.h"
#include "cuda/stream.h"

namespace expertflow::cuda {

// The threads that bring experts into the slots of a cache through the copy engine, chunk by chunk
// as its control hands them out. A pinned pool is copied from directly, by one thread; any other
// source is read by several, into pinned staging memory.
class CopyLanes {
 public:
  using Generation = uint32_t;  // as in SlotTableView

  struct Slots {
    std::byte* data;
    size_t slot_bytes;
    int32_t num_slots;
  };

  // The source if it can be copied from directly, else nullptr.
  static const PinnedPool* DirectSource(const ExpertSource& source);
  // What the control must allow.
  static int32_t MaxChunksInFlight(const ExpertSource& source, int32_t num_threads);

  // Starts the threads, on the device that is current. Keeps the references; `num_threads` at least
  // 1; `chunk_bytes` of those chunks that are staged.
  CopyLanes(SharedControl& shared, const SlotUses& uses, const ExpertSource& source,
            const Slots& slots, int32_t num_threads, size_t chunk_bytes);
  ~CopyLanes();
  CopyLanes(const CopyLanes&) = delete;
  CopyLanes& operator=(const CopyLanes&) = delete;

  // There may be a new chunk. With the lock held.
  void NotifyPosted();
  // Copies in progress are finished, and no more are begun.
  void Stop();

  // Whether the slot's transfer of that generation was submitted whole, or has ended.
  bool IsSubmitted(SlotId slot, Generation generation) const;
  // Block the host until then; without the lock. The second until it has ended.
  void AwaitSubmitted(SlotId slot, Generation generation) const;
  void AwaitEnded(SlotId slot, Generation generation) const;
  // What is enqueued on `stream` from now on comes after the slot's last submitted transfer.
  void MakeWait(SlotId slot, cudaStream_t stream) const;

 private:
  // One thread that copies, and its chunks under way: at most two, so that the copy engine never
  // idles and a demand overtakes prefetches after two chunks.
  static constexpr size_t kDepth = 2;
  struct Lane {
    std::byte* staging[kDepth] = {};  // none for a pinned pool
    CudaEvent copied[kDepth];
    std::thread thread;
  };
  struct Flight {
    Chunk chunk;
    size_t place;  // in the lane
    double begin_us;
  };
  // How far the copies into a slot are. The atomics are read without the lock.
  struct SlotProgress {
    std::atomic<Generation> submitted{0};  // the last transfer that was submitted whole, or ended
    std::atomic<Generation> ended{0};
    Generation generation = 0;  // of the transfer that is being submitted
    size_t submitted_bytes = 0;
  };

  void Start(size_t count, size_t chunk_bytes);
  void RunLane(Lane& lane);
  bool AwaitPost(uint64_t num_posts);
  std::optional<Chunk> TakeChunk(SlotUses::Use& use);
  bool Submit(Lane& lane, const Flight& flight, SlotUses::Use use);
  bool FinishIfCopied(const Lane& lane, const Flight& flight);
  void Finish(const Flight& flight, const std::optional<std::string>& error);
  void NoteSubmitted(const Chunk& chunk);
  SlotProgress& progress(SlotId slot) { return progress_[static_cast<size_t>(Index(slot))]; }
  const SlotProgress& progress(SlotId slot) const {
    return progress_[static_cast<size_t>(Index(slot))];
  }

  SharedControl& shared_;
  const SlotUses& uses_;
  const ExpertSource& source_;
  const PinnedPool* pinned_pool_;  // the source, if it can be copied from directly
  Slots slots_;
  int device_ = 0;
  CudaStream copy_stream_;
  std::optional<PinnedMemory> staging_;
  std::vector<CudaEvent> arrivals_;           // [num_slots] the last transfer is complete
  std::unique_ptr<SlotProgress[]> progress_;  // [num_slots]
  std::atomic<uint64_t> num_posts_{0};        // grows whenever there may be a new chunk
  bool stopping_ = false;                     // guarded by the lock of `shared_`
  std::condition_variable work_posted_;
  std::vector<std::unique_ptr<Lane>> lanes_;
};

}  // namespace expertflow::cuda
