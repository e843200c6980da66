#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "core/cache_control.h"
#include "core/expert_layout.h"
#include "core/expert_source.h"
#include "cuda/copy_lanes.h"
#include "cuda/device_memory.h"
#include "cuda/expert_mlp.h"
#include "cuda/id_readback.h"
#include "cuda/shared_control.h"
#include "cuda/slot_uses.h"
#include "cuda/stall_timer.h"

namespace expertflow::cuda {

// The expert cache of the CUDA backend, streamed path: slots in device memory, filled through the
// copy engine by threads of its own. A pinned pool is copied from directly, by one thread; any
// other source is read by `num_threads` threads into pinned staging memory and copied from there.
//
//   horizon = BeginToken(num_tokens); PrefetchPredicted(need of the first layers)
//   plan = BeginLayer(layer, ids, stream)   waits for the ids, posts what is missing
//   distances = BeginPrefetch(); PrefetchPredicted(need of the layers ahead)
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
  const Plan* plan() const { return shared_.control.plan(); }
  const std::optional<ExpertMlp>& mlp() const { return device_->mlp; }

  // What is enqueued on `stream` from now on finds the row's expert in its slot. Blocks the host
  // until the last chunk of it was submitted. Throws TransferError.
  void Wait(int32_t row, cudaStream_t stream);

  // What was enqueued on `stream` so far is the last to use the row's slot: the row that waits for
  // the slot, if any, is posted. Does nothing if none does.
  void Release(int32_t row, cudaStream_t stream);

  int32_t Prefetch(int32_t layer, std::span<const int64_t> expert_ids, int32_t distance);

  // The adaptive way: see the calls of CacheControl.
  void SetHorizon(int32_t horizon);
  int32_t BeginToken(int32_t num_tokens);
  int32_t BeginPrefetch();
  int32_t PrefetchPredicted(std::span<const float> need);
  int32_t horizon() const;

  std::byte* slot_data(SlotId slot) const {
    return device_->slots.data() + static_cast<size_t>(Index(slot)) * slot_bytes_;
  }
  const ExpertLayout& layout() const { return layout_; }
  size_t slot_bytes() const { return slot_bytes_; }
  int32_t num_slots() const { return shared_.control.table().num_slots; }
  int32_t num_experts() const { return shared_.control.table().num_experts; }  // of a layer
  int device() const { return device_number_; }

  std::vector<uint8_t> Residents(int32_t layer) const;  // see CacheControl
  std::vector<LayerStatistics> statistics();            // [num_layers]
  PrefetchStatistics prefetch_statistics() const;
  void ResetStatistics();
  double bandwidth_bytes_per_second() const;

 private:
  using Lock = SharedControl::Lock;

  // All that belongs to the device; leaked in a forked child.
  struct Device {
    Device(DeviceMemory memory, int32_t num_slots) : slots(std::move(memory)), uses(num_slots) {}

    DeviceMemory slots;
    SlotUses uses;
    IdReadback readback;
    StallTimer stalls;
    std::optional<ExpertMlp> mlp;
    std::optional<CopyLanes> lanes;  // last: its threads use the others
  };

  void LoadAll();
  void CollectStalls();
  void RecordUses(cudaStream_t stream);
  void CancelAll(Lock& lock);

  std::shared_ptr<const ExpertSource> source_;
  ExpertLayout layout_;
  size_t slot_bytes_;
  int device_number_;
  int fork_generation_;
  std::span<const int64_t> routed_ids_;
  cudaStream_t plan_stream_ = nullptr;
  SharedControl shared_;
  std::unique_ptr<Device> device_;
};

}  // namespace expertflow::cuda
