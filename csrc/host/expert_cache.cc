#include "host/expert_cache.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <utility>

#include "host/fork.h"

namespace expertflow {
namespace {

double NowUs() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

bool CanAlias(const RamPool* pool, const ExpertCacheOptions& options) {
  return pool != nullptr && options.planner.policy != PolicyKind::kOnDemand &&
         options.num_slots == options.num_layers * options.num_experts;
}

}  // namespace

ExpertCache::ExpertCache(std::shared_ptr<const ExpertSource> source, const ExpertLayout& layout,
                         const ExpertCacheOptions& options)
    : source_(std::move(source)),
      slot_bytes_(layout.slot_bytes()),
      slot_stride_bytes_(slot_bytes_),
      fork_generation_(ForkGeneration()),
      control_(options, std::max(options.num_threads, 0) + 1) {
  if (options.num_threads < 1) throw std::invalid_argument("num_threads must be at least 1");
  const int32_t num_experts_total = options.num_layers * options.num_experts;
  CheckHolds(*source_, static_cast<size_t>(num_experts_total), slot_bytes_);
  const auto* pool = dynamic_cast<const RamPool*>(source_.get());
  if (CanAlias(pool, options)) {
    slots_ = pool->expert_data(ExpertIndex{0});
    slot_stride_bytes_ = pool->stride_bytes();
    control_.MakeAllResident();
    return;  // nothing will ever be copied
  }
  memory_ = MappedMemory(static_cast<size_t>(options.num_slots) * slot_stride_bytes_);
  slots_ = memory_.data();
  try {
    for (int32_t i = 0; i < options.num_threads; ++i) {
      crew_->workers.emplace_back([this] { WorkerLoop(); });
    }
  } catch (...) {  // the system has no more threads
    StopWorkers();
    throw;
  }
}

ExpertCache::~ExpertCache() {
  if (ForkGeneration() == fork_generation_) {
    StopWorkers();
  } else {
    // The workers live in the parent only: their threads cannot be joined here, and destroying a
    // condition variable would wait for them for ever.
    static_cast<void>(crew_.release());
  }
}

void ExpertCache::StopWorkers() {
  {
    const Lock lock(mutex_);
    stopping_ = true;
  }
  crew_->work_posted.notify_all();
  for (std::thread& worker : crew_->workers) worker.join();
}

const Plan& ExpertCache::BeginLayer(int32_t layer, std::span<const int64_t> expert_ids,
                                    int32_t num_tokens) {
  CheckSameProcess(fork_generation_);
  Lock lock(mutex_);
  const double begin_us = NowUs();
  const Plan* plan = control_.BeginLayer(layer, expert_ids, num_tokens, begin_us);
  if (plan == nullptr) {  // transfers hold every slot
    CancelAll(lock);
    const double free_us = NowUs();
    control_.RecordStall(layer, free_us - begin_us, /*is_late=*/false);
    plan = control_.BeginLayer(layer, expert_ids, num_tokens, free_us);
  }
  if (control_.HasChunk()) crew_->work_posted.notify_all();
  return *plan;
}

void ExpertCache::Wait(int32_t row) {
  CheckSameProcess(fork_generation_);
  Lock lock(mutex_);
  if (control_.IsReady(row)) return;
  const double begin_us = NowUs();
  while (!control_.IsReady(row)) {
    // The row may be ready before a chunk of a prefetch is, so those are left to the workers.
    if (!control_.NextIsDemand() || !CopyOneChunk(lock)) crew_->chunk_finished.wait(lock);
  }
  const bool is_late = control_.RowAt(row).state == RowState::kLoading;
  control_.RecordStall(control_.plan()->layer, NowUs() - begin_us, is_late);
}

void ExpertCache::Release(int32_t row) {
  CheckSameProcess(fork_generation_);
  const Lock lock(mutex_);
  if (!control_.Owns(control_.RowAt(row)) || !control_.IsReady(row)) {
    throw std::invalid_argument("row " + std::to_string(row) +
                                " is not in its slot and cannot be released");
  }
  if (control_.Release(row) != kNoRow) crew_->work_posted.notify_one();
}

int32_t ExpertCache::Prefetch(int32_t layer, std::span<const int64_t> expert_ids,
                              int32_t distance) {
  CheckSameProcess(fork_generation_);
  const Lock lock(mutex_);
  const int32_t num_posted = control_.Prefetch(layer, expert_ids, distance);
  if (num_posted > 0) crew_->work_posted.notify_all();
  return num_posted;
}

void ExpertCache::SetHorizon(int32_t horizon) {
  CheckSameProcess(fork_generation_);
  const Lock lock(mutex_);
  control_.set_horizon(horizon);
}

int32_t ExpertCache::BeginToken(int32_t num_tokens) {
  CheckSameProcess(fork_generation_);
  const Lock lock(mutex_);
  return control_.BeginToken(num_tokens, NowUs());
}

int32_t ExpertCache::BeginPrefetch() {
  CheckSameProcess(fork_generation_);
  const Lock lock(mutex_);
  return control_.BeginPrefetch(bandwidth_.bytes_per_second());
}

int32_t ExpertCache::PrefetchPredicted(std::span<const float> need) {
  CheckSameProcess(fork_generation_);
  const Lock lock(mutex_);
  const int32_t num_posted = control_.PrefetchPredicted(need);
  if (num_posted > 0) crew_->work_posted.notify_all();
  return num_posted;
}

int32_t ExpertCache::horizon() const {
  CheckSameProcess(fork_generation_);
  const Lock lock(mutex_);
  return control_.horizon();
}

void ExpertCache::WorkerLoop() {
  Lock lock(mutex_);
  while (!stopping_) {
    if (!CopyOneChunk(lock)) crew_->work_posted.wait(lock);
  }
}

bool ExpertCache::CopyOneChunk(Lock& lock) {
  const std::optional<Chunk> chunk = control_.NextChunk();
  if (!chunk) return false;
  if (control_.HasChunk()) crew_->work_posted.notify_one();  // a transfer is more than one chunk
  lock.unlock();
  std::optional<std::string> error;
  const double begin_us = NowUs();
  try {
    std::byte* to = slot_data(chunk->slot) + chunk->offset_bytes;
    source_->Read(chunk->expert, chunk->offset_bytes, {to, chunk->num_bytes});
  } catch (const std::exception& e) {
    error = e.what();
  } catch (...) {
    error = "unknown error";
  }
  const double end_us = NowUs();
  lock.lock();
  if (!error) bandwidth_.Record(chunk->num_bytes, begin_us, end_us);
  control_.FinishChunk(*chunk, error);
  crew_->chunk_finished.notify_all();
  return true;
}

void ExpertCache::CancelAll(Lock& lock) {
  control_.CancelTransfers();
  crew_->chunk_finished.wait(lock, [this] { return control_.chunks_in_flight() == 0; });
}

std::vector<uint8_t> ExpertCache::Residents(int32_t layer) const {
  CheckSameProcess(fork_generation_);
  const Lock lock(mutex_);
  return control_.Residents(layer);
}

std::vector<LayerStatistics> ExpertCache::statistics() const {
  CheckSameProcess(fork_generation_);
  const Lock lock(mutex_);
  return control_.statistics();
}

PrefetchStatistics ExpertCache::prefetch_statistics() const {
  CheckSameProcess(fork_generation_);
  const Lock lock(mutex_);
  return control_.prefetch_statistics();
}

void ExpertCache::ResetStatistics() {
  CheckSameProcess(fork_generation_);
  const Lock lock(mutex_);
  control_.ResetStatistics();
}

double ExpertCache::bandwidth_bytes_per_second() const {
  CheckSameProcess(fork_generation_);
  const Lock lock(mutex_);
  return bandwidth_.bytes_per_second();
}

}  // namespace expertflow
