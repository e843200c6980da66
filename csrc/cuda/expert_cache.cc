#include "cuda/expert_cache.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "cuda/cuda_error.h"
#include "cuda/device_guard.h"
#include "host/fork.h"

namespace expertflow::cuda {
namespace {

// A demanded expert is one copy if it can be: gaps between copies cost 3 us each.
constexpr size_t kDemandChunkBytes = size_t{24} << 20;

// A pinned pool needs no staging memory, so its demands may be large.
ExpertCacheOptions WithDemandChunks(ExpertCacheOptions options, bool is_pinned) {
  if (is_pinned) options.demand_chunk_bytes = kDemandChunkBytes;
  return options;
}

void RefuseCapture(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  EXPERTFLOW_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  if (status == cudaStreamCaptureStatusNone) return;
  throw std::logic_error(
      "streamed experts cannot be captured in a CUDA graph: the host reads which experts are "
      "missing. Capture the parts of the model between the experts");
}

}  // namespace

ExpertCache::ExpertCache(std::shared_ptr<const ExpertSource> source, const ExpertLayout& layout,
                         const ExpertCacheOptions& options, int device,
                         const std::optional<ExpertMlpShape>& mlp)
    : source_(std::move(source)),
      layout_(layout),
      slot_bytes_(layout.slot_bytes()),
      device_number_(device),
      fork_generation_(ForkGeneration()),
      shared_(WithDemandChunks(options, CopyLanes::DirectSource(*source_) != nullptr),
              CopyLanes::MaxChunksInFlight(*source_, std::max(options.num_threads, 1))) {
  if (options.num_threads < 1) throw std::invalid_argument("num_threads must be at least 1");
  const int32_t num_experts_total = options.num_layers * options.num_experts;
  CheckHolds(*source_, static_cast<size_t>(num_experts_total), slot_bytes_);

  const DeviceGuard guard(device);
  const auto num_slots = static_cast<size_t>(options.num_slots);
  device_ = std::make_unique<Device>(
      DeviceMemory(num_slots * slot_bytes_,
                   "an expert cache of " + std::to_string(num_slots) + " slots"),
      options.num_slots);
  if (mlp) device_->mlp.emplace(*mlp);
  device_->lanes.emplace(shared_, device_->uses, *source_,
                         CopyLanes::Slots{device_->slots.data(), slot_bytes_, options.num_slots},
                         options.num_threads, AlignUp(options.chunk_bytes, kSlotAlignment));
  if (options.num_slots == num_experts_total && options.planner.policy != PolicyKind::kOnDemand) {
    LoadAll();
  }
}

ExpertCache::~ExpertCache() {
  if (ForkGeneration() != fork_generation_) {
    // Neither the lanes nor the context of the device exist here.
    static_cast<void>(device_.release());
    return;
  }
  device_->lanes->Stop();
  try {
    const DeviceGuard guard(device_number_);
    device_.reset();  // freeing the slots waits for the work that reads them
  } catch (const CudaError&) {
    // The device is lost, and its memory with it.
    static_cast<void>(device_.release());
  }
}

void ExpertCache::LoadAll() {
  Lock lock = shared_.Acquire();
  shared_.control.PostAll();
  device_->lanes->NotifyPosted();
  while (shared_.control.HasTransfers()) {
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    lock.lock();
  }
  shared_.control.CheckAllResident();
  shared_.control.ResetStatistics();
}

const Plan& ExpertCache::BeginLayer(int32_t layer, const int64_t* expert_ids, size_t num_ids,
                                    int32_t num_tokens, cudaStream_t stream) {
  CheckSameProcess(fork_generation_);
  const DeviceGuard guard(device_number_);
  RefuseCapture(stream);
  routed_ids_ = {};  // they are overwritten, whether or not this succeeds
  routed_ids_ = device_->readback.Read(expert_ids, num_ids, stream);
  Lock lock = shared_.Acquire();
  CollectStalls();
  RecordUses(plan_stream_);
  plan_stream_ = stream;
  const double begin_us = NowUs();
  const Plan* plan = shared_.control.BeginLayer(layer, routed_ids_, num_tokens, begin_us);
  if (plan == nullptr) {  // transfers hold every slot
    CancelAll(lock);
    const double free_us = NowUs();
    shared_.control.RecordStall(layer, free_us - begin_us, /*is_late=*/false);
    plan = shared_.control.BeginLayer(layer, routed_ids_, num_tokens, free_us);
  }
  device_->lanes->NotifyPosted();
  return *plan;
}

void ExpertCache::CollectStalls() {
  device_->stalls.Collect([this](int32_t of_layer, double stall_us, bool is_late) {
    shared_.control.RecordStall(of_layer, stall_us, is_late);
  });
}

void ExpertCache::RecordUses(cudaStream_t stream) {
  if (shared_.control.plan() == nullptr) return;
  const SlotUses::Use use = device_->uses.Record(stream);
  for (const PlanRow& row : shared_.control.plan()->rows) device_->uses.Set(row.slot, use);
}

void ExpertCache::Wait(int32_t row_index, cudaStream_t stream) {
  CheckSameProcess(fork_generation_);
  const DeviceGuard guard(device_number_);
  Lock lock = shared_.Acquire();
  if (shared_.control.IsReady(row_index)) return;
  const bool is_late = shared_.control.RowAt(row_index).state == RowState::kLoading;
  device_->stalls.Begin(stream, shared_.control.plan()->layer, is_late);
  while (!shared_.control.IsReady(row_index)) {
    const SlotId slot = shared_.control.RowAt(row_index).slot;
    const CopyLanes::Generation generation = shared_.control.table().slot_generation[Index(slot)];
    if (device_->lanes->IsSubmitted(slot, generation)) {
      device_->lanes->MakeWait(slot, stream);
      break;
    }
    lock.unlock();
    device_->lanes->AwaitSubmitted(slot, generation);
    lock = shared_.Acquire();
  }
  device_->stalls.End(stream);
}

void ExpertCache::Release(int32_t row_index, cudaStream_t stream) {
  CheckSameProcess(fork_generation_);
  const DeviceGuard guard(device_number_);
  Lock lock = shared_.Acquire();
  const PlanRow row = shared_.control.RowAt(row_index);
  if (row.next_row == kNoRow) return;
  const CopyLanes::Generation generation = shared_.control.table().slot_generation[Index(row.slot)];
  while (
      !shared_.control.IsReady(row_index)) {  // the queue takes a slot again only once it is idle
    lock.unlock();
    device_->lanes->AwaitEnded(row.slot, generation);
    lock = shared_.Acquire();
  }
  device_->uses.Set(row.slot, device_->uses.Record(stream));
  shared_.control.Release(row_index);
  device_->lanes->NotifyPosted();
}

int32_t ExpertCache::Prefetch(int32_t layer, std::span<const int64_t> expert_ids,
                              int32_t distance) {
  CheckSameProcess(fork_generation_);
  const Lock lock = shared_.Acquire();
  const int32_t num_posted = shared_.control.Prefetch(layer, expert_ids, distance);
  if (num_posted > 0) device_->lanes->NotifyPosted();
  return num_posted;
}

void ExpertCache::SetHorizon(int32_t horizon) {
  CheckSameProcess(fork_generation_);
  const Lock lock = shared_.Acquire();
  shared_.control.set_horizon(horizon);
}

int32_t ExpertCache::BeginToken(int32_t num_tokens) {
  CheckSameProcess(fork_generation_);
  const Lock lock = shared_.Acquire();
  return shared_.control.BeginToken(num_tokens, NowUs());
}

int32_t ExpertCache::BeginPrefetch() {
  CheckSameProcess(fork_generation_);
  const Lock lock = shared_.Acquire();
  return shared_.control.BeginPrefetch(shared_.bandwidth.bytes_per_second());
}

int32_t ExpertCache::PrefetchPredicted(std::span<const float> need) {
  CheckSameProcess(fork_generation_);
  const Lock lock = shared_.Acquire();
  const int32_t num_posted = shared_.control.PrefetchPredicted(need);
  if (num_posted > 0) device_->lanes->NotifyPosted();
  return num_posted;
}

int32_t ExpertCache::horizon() const {
  CheckSameProcess(fork_generation_);
  const Lock lock = shared_.Acquire();
  return shared_.control.horizon();
}

void ExpertCache::CancelAll(Lock& lock) {
  shared_.control.CancelTransfers();
  while (shared_.control.chunks_in_flight() > 0) {
    lock.unlock();
    Pause();
    lock.lock();
  }
}

std::vector<uint8_t> ExpertCache::Residents(int32_t layer) const {
  CheckSameProcess(fork_generation_);
  const Lock lock = shared_.Acquire();
  return shared_.control.Residents(layer);
}

std::vector<LayerStatistics> ExpertCache::statistics() {
  CheckSameProcess(fork_generation_);
  const DeviceGuard guard(device_number_);
  const Lock lock = shared_.Acquire();
  CollectStalls();
  return shared_.control.statistics();
}

PrefetchStatistics ExpertCache::prefetch_statistics() const {
  CheckSameProcess(fork_generation_);
  const Lock lock = shared_.Acquire();
  return shared_.control.prefetch_statistics();
}

void ExpertCache::ResetStatistics() {
  CheckSameProcess(fork_generation_);
  const DeviceGuard guard(device_number_);
  const Lock lock = shared_.Acquire();
  device_->stalls.Forget();
  shared_.control.ResetStatistics();
}

double ExpertCache::bandwidth_bytes_per_second() const {
  CheckSameProcess(fork_generation_);
  const Lock lock = shared_.Acquire();
  return shared_.bandwidth.bytes_per_second();
}

}  // namespace expertflow::cuda
