#pragma once

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
#include "host/mapped_memory.h"
#include "host/ram_pool.h"

namespace expertflow {

// The expert cache of the CPU backend: slots in RAM, filled from a source by worker threads.
//
//   horizon = BeginToken(num_tokens); PrefetchPredicted(need of the first layers)
//   plan = BeginLayer(layer, ids)       posts what is missing
//   distances = BeginPrefetch(); PrefetchPredicted(need of the layers ahead)
//   Prefetch(later layer, ids)          any time
//   for each row: Wait(row); compute with slot_data(rows[row].slot); Release(row)
//
// One thread at a time drives it (the caller sees to that); statistics may be read from any thread.
// If a transfer fails, Wait throws TransferError and the layer may be begun again. In a forked
// child every call throws std::logic_error.
class ExpertCache {
 public:
  // With as many slots as experts, a RamPool as source and a policy that keeps experts, the slots
  // are the pool's own memory and every expert is resident from the start. Throws
  // std::invalid_argument for options that do not fit each other or the source, std::bad_alloc.
  ExpertCache(std::shared_ptr<const ExpertSource> source, const ExpertLayout& layout,
              const ExpertCacheOptions& options);
  // Copies in progress are finished, the rest is dropped. In a forked child nothing is waited for.
  ~ExpertCache();

  ExpertCache(const ExpertCache&) = delete;
  ExpertCache& operator=(const ExpertCache&) = delete;

  // Plans a layer (see Planner::PlanLayer) and posts its first wave. The plan is valid until the
  // next call, which ends this layer also if not all its rows were waited for. Throws
  // std::out_of_range for bad ids; std::logic_error after a fork.
  const Plan& BeginLayer(int32_t layer, std::span<const int64_t> expert_ids, int32_t num_tokens);

  // Blocks until the row's expert is in its slot; it stays there until Release. Copies chunks
  // itself meanwhile. Throws TransferError.
  void Wait(int32_t row);

  // The caller is done with the row's slot: the row that waits for the slot, if any, is posted.
  // Throws std::invalid_argument if the row is not in its slot.
  void Release(int32_t row);

  // Posts the experts that a layer will need `distance` layers from now, in this order, while slots
  // can be had. Returns how many were posted. A prefetch that fails is dropped: the layer's demand
  // meets the error, if it persists.
  int32_t Prefetch(int32_t layer, std::span<const int64_t> expert_ids, int32_t distance);

  // The adaptive way: see the calls of CacheControl.
  void SetHorizon(int32_t horizon);
  int32_t BeginToken(int32_t num_tokens);
  int32_t BeginPrefetch();
  int32_t PrefetchPredicted(std::span<const float> need);
  int32_t horizon() const;

  std::byte* slot_data(SlotId slot) const {
    return slots_ + static_cast<size_t>(Index(slot)) * slot_stride_bytes_;
  }
  size_t slot_bytes() const { return slot_bytes_; }
  int32_t num_slots() const { return control_.table().num_slots; }
  int32_t num_experts() const { return control_.table().num_experts; }  // of a layer

  std::vector<uint8_t> Residents(int32_t layer) const;  // see CacheControl
  std::vector<LayerStatistics> statistics() const;      // [num_layers]
  PrefetchStatistics prefetch_statistics() const;
  void ResetStatistics();
  double bandwidth_bytes_per_second() const;

 private:
  using Lock = std::unique_lock<std::mutex>;

  // The threads that copy, and what they and the caller wait on.
  struct Crew {
    std::condition_variable work_posted;
    std::condition_variable chunk_finished;
    std::vector<std::thread> workers;
  };

  void StopWorkers();
  void WorkerLoop();
  // Copies the next chunk with the lock released meanwhile. False if there is none.
  bool CopyOneChunk(Lock& lock);
  void CancelAll(Lock& lock);

  std::shared_ptr<const ExpertSource> source_;
  size_t slot_bytes_;
  size_t slot_stride_bytes_;
  MappedMemory memory_;
  std::byte* slots_;
  int fork_generation_;  // of the process that owns the workers

  mutable std::mutex mutex_;  // guards everything below
  CacheControl control_;
  BandwidthEstimator bandwidth_;
  bool stopping_ = false;

  std::unique_ptr<Crew> crew_ = std::make_unique<Crew>();
};

}  // namespace expertflow
