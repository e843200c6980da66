#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "core/bandwidth_estimator.h"
#include "core/cache_control.h"
#include "core/expert_layout.h"
#include "core/expert_source.h"
#include "cuda/device_memory.h"
#include "cuda/event.h"
#include "cuda/expert_mlp.h"
#include "cuda/id_readback.h"
#include "cuda/pinned_pool.h"
#include "cuda/stall_timer.h"
#include "cuda/stream.h"

namespace expertflow::cuda {

// The expert cache of the CUDA backend, streamed path: slots in device memory, filled through the
// copy engine by threads of its own. A pinned pool is copied from directly, by one thread; any
// other source is read by `num_threads` threads into pinned staging memory and copied from there.
//
//   plan = BeginLayer(layer, ids, stream)   waits for the ids, posts what is missing
//   Prefetch(later layer, ids)              any time
//   for each row: Wait(row, stream); enqueue its work on the stream; Release(row, stream)
//
// `stream` is the one that computes; work on it is ordered by events, and the host waits for ids
// and submissions only. One thread at a time drives the cache; statistics may be read from any.
// Errors are as those of the host's ExpertCache, and CudaError.
class ExpertCache {
 public:
  // On `device`. With a slot for every expert and a policy that keeps experts, all are loaded at
  // once, each into the slot of its own number. Throws std::invalid_argument for options that do
  // not fit each other or the source, OutOfDeviceMemory, CudaError, TransferError.
  ExpertCache(std::shared_ptr<const ExpertSource> source, const ExpertLayout& layout,
              const ExpertCacheOptions& options, int device,
              const std::optional<ExpertMlpShape>& mlp = std::nullopt);
  // Copies in progress are finished, the rest is dropped. In a forked child the device's resources
  // are left alone.
  ~ExpertCache();

  ExpertCache(const ExpertCache&) = delete;
  ExpertCache& operator=(const ExpertCache&) = delete;

  // Plans a layer for `expert_ids` [num_tokens * k] in device memory. The plan is valid until the
  // next call. Throws std::logic_error if the stream is being captured: this path reads back.
  const Plan& BeginLayer(int32_t layer, const int64_t* expert_ids, size_t num_ids,
                         int32_t num_tokens, cudaStream_t stream);

  // The ids that the current plan was made for, on the host.
  std::span<const int64_t> routed_ids() const { return routed_ids_; }
  const Plan* plan() const { return control_.plan(); }
  const std::optional<ExpertMlp>& mlp() const { return device_->mlp; }

  // What is enqueued on `stream` from now on finds the row's expert in its slot. Blocks the host
  // until the last chunk of it was submitted. Throws TransferError.
  void Wait(int32_t row, cudaStream_t stream);

  // What was enqueued on `stream` so far is the last to use the row's slot: the row that waits for
  // the slot, if any, is posted. Does nothing if none does.
  void Release(int32_t row, cudaStream_t stream);

  int32_t Prefetch(int32_t layer, std::span<const int64_t> expert_ids, int32_t distance);

  std::byte* slot_data(SlotId slot) const {
    return device_->slots.data() + static_cast<size_t>(Index(slot)) * slot_bytes_;
  }
  const ExpertLayout& layout() const { return layout_; }
  size_t slot_bytes() const { return slot_bytes_; }
  int32_t num_slots() const { return control_.table().num_slots; }
  int device() const { return device_number_; }

  std::vector<uint8_t> Residents(int32_t layer) const;  // see CacheControl
  std::vector<LayerStatistics> statistics();            // [num_layers]
  void ResetStatistics();
  double bandwidth_bytes_per_second() const;

 private:
  using Lock = std::unique_lock<std::mutex>;
  using Generation = uint32_t;  // as in SlotTableView

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
  // How far the copies into a slot are, read without the lock.
  struct SlotProgress {
    std::atomic<Generation> submitted{0};  // the last transfer that was submitted whole, or ended
    std::atomic<Generation> ended{0};
    Generation generation = 0;  // of the transfer that is being submitted
    size_t submitted_bytes = 0;
    size_t use = 0;  // index in `uses` of the last use of the slot
  };
  struct Use {
    CudaEvent event;
    cudaStream_t stream = nullptr;
  };
  // All that belongs to the device; leaked in a forked child.
  struct Device {
    DeviceMemory slots;
    CudaStream copy_stream;
    std::optional<PinnedMemory> staging;
    std::vector<std::unique_ptr<Lane>> lanes;
    std::vector<CudaEvent> arrivals;  // [num_slots] the last transfer into the slot is complete
    std::vector<Use> uses;            // a ring: the slots that refer to it were last used before
    IdReadback readback;
    StallTimer stalls;
    std::optional<ExpertMlp> mlp;
    std::condition_variable work_posted;
  };

  // Locks without sleeping: the lock is held for a few microseconds at most, and to be woken up
  // takes ten times as long.
  Lock Acquire() const;
  void LoadAll();
  void StartLanes(size_t chunk_bytes);
  void StopLanes();
  void RunLane(Lane& lane);
  bool AwaitPost(uint64_t num_posts);
  std::optional<Chunk> TakeChunk(size_t& use);
  bool Submit(Lane& lane, const Flight& flight, size_t use);
  bool FinishIfCopied(const Lane& lane, const Flight& flight);
  void Finish(const Flight& flight, const std::optional<std::string>& error);
  void NoteSubmitted(const Chunk& chunk);
  void CollectStalls();
  void NotifyPosted();
  void RecordUses(cudaStream_t stream);
  size_t RecordUse(cudaStream_t stream);
  void CancelAll(Lock& lock);
  SlotProgress& progress(SlotId slot) { return progress_[static_cast<size_t>(Index(slot))]; }

  std::shared_ptr<const ExpertSource> source_;
  const PinnedPool* pinned_pool_;  // the source, if it can be copied from directly
  int32_t num_lanes_;
  ExpertLayout layout_;
  size_t slot_bytes_;
  int device_number_;
  int fork_generation_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<SlotProgress[]> progress_;  // [num_slots]
  std::span<const int64_t> routed_ids_;
  cudaStream_t plan_stream_ = nullptr;

  mutable std::mutex mutex_;  // guards everything below, and what is not atomic in `progress_`
  CacheControl control_;
  BandwidthEstimator bandwidth_;
  size_t next_use_ = 0;
  bool stopping_ = false;
  std::atomic<uint64_t> num_posts_{0};  // grows whenever there may be a new chunk
};

}  // namespace expertflow::cuda
