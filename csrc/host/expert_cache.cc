#include "host/expert_cache.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <stdexcept>
#include <utility>

namespace expertflow {
namespace {

double NowUs() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// How many forks lie between this process and the one that loaded the library. Unlike getpid, which
// takes 0.1 to 0.2 us, reading it costs nothing.
int ForkGeneration() {
  static std::atomic<int> generation{0};
  static const int registered = pthread_atfork(nullptr, nullptr, [] { ++generation; });
  if (registered != 0) throw std::bad_alloc();  // the only way in which it fails
  return generation.load(std::memory_order_relaxed);
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
      table_(options.num_layers, options.num_experts, options.num_slots),
      planner_(table_, options.planner),
      queue_(options.num_slots, AlignUp(options.chunk_bytes, kSlotAlignment),
             std::max(options.num_threads, 0) + 1),
      failures_(static_cast<size_t>(options.num_slots)) {
  if (options.num_slots > options.num_layers * options.num_experts) {
    throw std::invalid_argument("a cache of " + std::to_string(options.num_slots) +
                                " experts is larger than the model");
  }
  if (options.num_threads < 1) throw std::invalid_argument("num_threads must be at least 1");
  const int32_t num_experts_total = options.num_layers * options.num_experts;
  CheckHolds(*source_, static_cast<size_t>(num_experts_total), slot_bytes_);
  const auto* pool = dynamic_cast<const RamPool*>(source_.get());
  if (CanAlias(pool, options)) {
    AliasPool(*pool);
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

void ExpertCache::AliasPool(const RamPool& pool) {
  slots_ = pool.expert_data(ExpertIndex{0});
  slot_stride_bytes_ = pool.stride_bytes();
  for (int32_t s = 0; s < num_slots(); ++s) {
    Assign(table_.view(), SlotId{s}, ExpertIndex{s});
    planner_.Publish(SlotId{s});
    table_.view().slot_key[s] = 0;
  }
}

const Plan& ExpertCache::BeginLayer(int32_t layer, std::span<const int64_t> expert_ids,
                                    int32_t num_tokens) {
  CheckProcess();
  Lock lock(mutex_);
  ++now_;
  plan_ = nullptr;
  const Plan* plan = planner_.PlanLayer(layer, expert_ids, num_tokens, now_);
  if (plan == nullptr) {  // transfers hold every slot
    const double begin_us = NowUs();
    CancelAll(lock);
    planner_.statistics(layer).stall_us += NowUs() - begin_us;
    plan = planner_.PlanLayer(layer, expert_ids, num_tokens, now_);
  }
  plan_ = plan;
  for (const PlanRow& row : plan_->rows) {
    if (row.state == RowState::kLoading) queue_.Promote(row.slot, now_);
    if (row.state == RowState::kMiss && row.wave == 0) PostRow(row);
  }
  return *plan_;
}

void ExpertCache::PostRow(const PlanRow& row) {
  const ExpertIndex expert = ToIndex(table_.view(), {plan_->layer, row.expert});
  failures_[static_cast<size_t>(Index(row.slot))].reset();
  queue_.Post(row.slot, expert, slot_bytes_, TransferClass::kDemand, plan_->tick);
  crew_->work_posted.notify_one();
}

void ExpertCache::Wait(int32_t row_index) {
  CheckProcess();
  Lock lock(mutex_);
  const PlanRow& row = RowAt(row_index);
  const ExpertId id{plan_->layer, row.expert};
  const int32_t s = Index(row.slot);
  const SlotTableView& table = table_.view();
  const double begin_us = NowUs();
  bool stalled = false;
  while (table.slot_expert[s] != ToIndex(table, id) || table.slot_state[s] != SlotState::kReady) {
    if (table.slot_expert[s] != ToIndex(table, id)) {
      const std::optional<std::string>& cause = failures_[static_cast<size_t>(s)];
      if (cause) throw TransferError(id, *cause);
      throw std::invalid_argument("row " + std::to_string(row_index) +
                                  " takes over a slot that was not released");
    }
    stalled = true;
    // The row may be ready before a chunk of a prefetch is, so those are left to the workers.
    if (!queue_.NextIsDemand() || !CopyOneChunk(lock)) crew_->chunk_finished.wait(lock);
  }
  if (stalled) planner_.statistics(id.layer).stall_us += NowUs() - begin_us;
}

void ExpertCache::Release(int32_t row_index) {
  CheckProcess();
  const Lock lock(mutex_);
  const PlanRow& row = RowAt(row_index);
  const SlotTableView& table = table_.view();
  if (table.slot_expert[Index(row.slot)] != ToIndex(table, {plan_->layer, row.expert}) ||
      table.slot_state[Index(row.slot)] != SlotState::kReady) {
    throw std::invalid_argument("row " + std::to_string(row_index) +
                                " is not in its slot and cannot be released");
  }
  const int32_t next = planner_.Advance(row_index);
  if (next != kNoRow) PostRow(RowAt(next));
}

int32_t ExpertCache::Prefetch(int32_t layer, std::span<const int64_t> expert_ids,
                              int32_t distance) {
  CheckProcess();
  const Lock lock(mutex_);
  const Tick needed_at = now_ + distance;
  int32_t num_posted = 0;
  for (const int64_t expert : expert_ids) {
    const ExpertId id{layer, Saturated(expert)};
    const SlotId slot = planner_.PlanPrefetch(id, now_, needed_at);
    if (slot == SlotId::kNone) continue;
    failures_[static_cast<size_t>(Index(slot))].reset();
    queue_.Post(slot, ToIndex(table_.view(), id), slot_bytes_, TransferClass::kPrefetch, needed_at);
    crew_->work_posted.notify_one();
    ++num_posted;
  }
  return num_posted;
}

void ExpertCache::WorkerLoop() {
  Lock lock(mutex_);
  while (!stopping_) {
    if (!CopyOneChunk(lock)) crew_->work_posted.wait(lock);
  }
}

bool ExpertCache::CopyOneChunk(Lock& lock) {
  const std::optional<Chunk> chunk = queue_.Next();
  if (!chunk) return false;
  const bool is_prefetch = queue_.IsPrefetch(chunk->slot);
  planner_.Submit(chunk->slot);
  if (queue_.HasNext()) crew_->work_posted.notify_one();  // a transfer is more than one chunk
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
  FinishChunk(*chunk, is_prefetch, error);
  return true;
}

void ExpertCache::FinishChunk(const Chunk& chunk, bool is_prefetch,
                              const std::optional<std::string>& error) {
  std::optional<std::string>& failure = failures_[static_cast<size_t>(Index(chunk.slot))];
  const int32_t layer = ToId(table_.view(), chunk.expert).layer;
  LayerStatistics& counts = planner_.statistics(layer);
  (is_prefetch ? counts.prefetch_bytes : counts.demand_bytes) +=
      error ? 0 : static_cast<int64_t>(chunk.num_bytes);
  if (error) failure = error;
  switch (queue_.Finish(chunk, !error)) {
    case TransferStatus::kInFlight:
      break;
    case TransferStatus::kDone:
      failure.reset();  // of a try before this one
      planner_.Publish(chunk.slot);
      break;
    case TransferStatus::kDropped:
    case TransferStatus::kFailed:
      DropTransfer(chunk.slot, layer);
      break;
  }
  crew_->chunk_finished.notify_all();
}

void ExpertCache::DropTransfer(SlotId slot, int32_t layer) {
  if (table_.view().slot_unused[Index(slot)]) {
    planner_.statistics(layer).wasted_prefetch_bytes +=
        static_cast<int64_t>(queue_.copied_bytes(slot));
  }
  planner_.Drop(slot);
}

void ExpertCache::CancelAll(Lock& lock) {
  for (int32_t s = 0; s < num_slots(); ++s) {
    const SlotId slot{s};
    if (queue_.IsIdle(slot)) continue;
    const int32_t layer = ToId(table_.view(), table_.view().slot_expert[s]).layer;
    if (queue_.Cancel(slot)) DropTransfer(slot, layer);
  }
  crew_->chunk_finished.wait(lock, [this] { return queue_.chunks_in_flight() == 0; });
}

const PlanRow& ExpertCache::RowAt(int32_t row) const {
  if (plan_ == nullptr || row < 0 || row >= static_cast<int32_t>(plan_->rows.size())) {
    throw std::out_of_range("row " + std::to_string(row) + " is not in the current plan");
  }
  return plan_->rows[static_cast<size_t>(row)];
}

void ExpertCache::CheckProcess() const {
  if (ForkGeneration() != fork_generation_) {
    throw std::logic_error(
        "this expert cache was made before a fork and cannot be used in the child: "
        "load the model in the process that runs it");
  }
}

std::vector<LayerStatistics> ExpertCache::statistics() const {
  CheckProcess();
  const Lock lock(mutex_);
  return planner_.statistics();
}

void ExpertCache::ResetStatistics() {
  CheckProcess();
  const Lock lock(mutex_);
  planner_.ResetStatistics();
}

double ExpertCache::bandwidth_bytes_per_second() const {
  CheckProcess();
  const Lock lock(mutex_);
  return bandwidth_.bytes_per_second();
}

}  // namespace expertflow
