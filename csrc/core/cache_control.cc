#include "core/cache_control.h"

#include <stdexcept>

#include "core/expert_layout.h"

namespace expertflow {

CacheControl::CacheControl(const ExpertCacheOptions& options, int32_t max_chunks_in_flight)
    : expert_bytes_(options.planner.expert_bytes),
      table_(options.num_layers, options.num_experts, options.num_slots),
      planner_(table_, options.planner),
      queue_(options.num_slots, AlignUp(options.chunk_bytes, kSlotAlignment), max_chunks_in_flight,
             AlignUp(options.demand_chunk_bytes, kSlotAlignment)),
      prefetcher_(table_.view(), planner_, queue_, options.planner),
      failures_(static_cast<size_t>(options.num_slots)) {
  if (options.num_slots > options.num_layers * options.num_experts) {
    throw std::invalid_argument("a cache of " + std::to_string(options.num_slots) +
                                " experts is larger than the model");
  }
}

const Plan* CacheControl::BeginLayer(int32_t layer, std::span<const int64_t> expert_ids,
                                     int32_t num_tokens, double now_us) {
  plan_ = nullptr;
  plan_ = planner_.PlanLayer(layer, expert_ids, num_tokens, ++now_);
  if (plan_ == nullptr) return nullptr;
  clock_.RecordPlan(*plan_, now_us);
  prefetcher_.RecordPlan(*plan_);
  for (const PlanRow& row : plan_->rows) {
    if (row.state == RowState::kLoading) queue_.Promote(row.slot, now_);
    if (row.state == RowState::kMiss && row.wave == 0) PostRow(row);
  }
  return plan_;
}

const PlanRow& CacheControl::RowAt(int32_t row) const {
  if (plan_ == nullptr || row < 0 || row >= static_cast<int32_t>(plan_->rows.size())) {
    throw std::out_of_range("row " + std::to_string(row) + " is not in the current plan");
  }
  return plan_->rows[static_cast<size_t>(row)];
}

bool CacheControl::IsReady(int32_t row_index) const {
  const PlanRow& row = RowAt(row_index);
  const auto s = static_cast<size_t>(Index(row.slot));
  if (Owns(row)) return table().slot_state[s] == SlotState::kReady;
  if (failures_[s]) throw TransferError({plan_->layer, row.expert}, *failures_[s]);
  throw std::invalid_argument("row " + std::to_string(row_index) +
                              " takes over a slot that was not released");
}

int32_t CacheControl::Release(int32_t row_index) {
  const int32_t next = planner_.Advance(row_index);
  if (next != kNoRow) PostRow(RowAt(next));
  return next;
}

int32_t CacheControl::BeginPrefetch(double bytes_per_second) {
  if (!clock_.last()) return prefetcher_.BeginUnmeasuredLayer();
  LayerObservation measured = *clock_.last();
  measured.bytes_per_second = bytes_per_second;
  return prefetcher_.BeginLayer(measured);
}

int32_t CacheControl::BeginToken(int32_t num_tokens, double now_us) {
  clock_.BeginToken(now_us);
  return prefetcher_.BeginToken(num_tokens, clock_.first_us());
}

int32_t CacheControl::PrefetchPredicted(std::span<const float> need) {
  return prefetcher_.PrefetchNeeded(need, [this](SlotId slot, Tick needed_at) {
    Post(slot, table().slot_expert[Index(slot)], TransferClass::kPrefetch, needed_at);
  });
}

int32_t CacheControl::Prefetch(int32_t layer, std::span<const int64_t> expert_ids,
                               int32_t distance) {
  const Tick needed_at = now_ + distance;
  int32_t num_posted = 0;
  for (const int64_t expert : expert_ids) {
    const ExpertId id{layer, Saturated(expert)};
    const SlotId slot = prefetcher_.Take(id, needed_at);
    if (slot == SlotId::kNone) continue;
    Post(slot, ToIndex(table(), id), TransferClass::kPrefetch, needed_at);
    ++num_posted;
  }
  return num_posted;
}

std::vector<uint8_t> CacheControl::Residents(int32_t layer) const {
  if (layer < 0 || layer >= table().num_layers) {
    throw std::out_of_range("the model has no MoE layer " + std::to_string(layer));
  }
  std::vector<uint8_t> is_resident(static_cast<size_t>(table().num_experts));
  for (int32_t e = 0; e < table().num_experts; ++e) {
    const SlotId slot = table().expert_slot[Index(ToIndex(table(), {layer, e}))];
    is_resident[static_cast<size_t>(e)] = slot != SlotId::kNone;
  }
  return is_resident;
}

void CacheControl::MakeAllResident() {
  for (int32_t s = 0; s < table().num_slots; ++s) {
    Assign(table(), SlotId{s}, ExpertIndex{s});
    planner_.Publish(SlotId{s});
    table().slot_key[s] = 0;
  }
}

void CacheControl::PostAll() {
  for (int32_t s = 0; s < table().num_slots; ++s) {
    Assign(table(), SlotId{s}, ExpertIndex{s});
    table().slot_key[s] = 0;
    Post(SlotId{s}, ExpertIndex{s}, TransferClass::kPrefetch, now_);
  }
}

void CacheControl::CheckAllResident() const {
  for (int32_t s = 0; s < table().num_slots; ++s) {
    const auto& failure = failures_[static_cast<size_t>(s)];
    if (failure) throw TransferError(ToId(table(), ExpertIndex{s}), *failure);
  }
}

void CacheControl::PostRow(const PlanRow& row) {
  Post(row.slot, ExpertOf(row), TransferClass::kDemand, plan_->tick);
}

void CacheControl::Post(SlotId slot, ExpertIndex expert, TransferClass transfer_class,
                        Tick needed_at) {
  FailureOf(slot).reset();
  queue_.Post(slot, expert, expert_bytes_, transfer_class, needed_at);
}

std::optional<Chunk> CacheControl::NextChunk() {
  const std::optional<Chunk> chunk = queue_.Next();
  if (chunk) planner_.Submit(chunk->slot);
  return chunk;
}

void CacheControl::FinishChunk(const Chunk& chunk, const std::optional<std::string>& error) {
  const int32_t layer = ToId(table(), chunk.expert).layer;
  if (error) {
    FailureOf(chunk.slot) = error;
  } else {
    LayerStatistics& counts = planner_.statistics(layer);
    const bool is_prefetch = chunk.transfer_class == TransferClass::kPrefetch;
    (is_prefetch ? counts.prefetch_bytes : counts.demand_bytes) +=
        static_cast<int64_t>(chunk.num_bytes);
    clock_.RecordMoved(chunk.num_bytes);
  }
  switch (queue_.Finish(chunk, !error)) {
    case TransferStatus::kInFlight:
      break;
    case TransferStatus::kDone:
      FailureOf(chunk.slot).reset();  // of a try before this one
      planner_.Publish(chunk.slot);
      break;
    case TransferStatus::kDropped:
    case TransferStatus::kFailed:
      planner_.Drop(chunk.slot, queue_.copied_bytes(chunk.slot));
      break;
  }
}

void CacheControl::RecordStall(int32_t layer, double stall_us, bool is_late) {
  planner_.statistics(layer).stall_us += stall_us;
  clock_.RecordStall(stall_us, is_late);
}

void CacheControl::ResetStatistics() {
  planner_.ResetStatistics();
  prefetcher_.ResetStatistics();
}

void CacheControl::CancelTransfers() {
  for (int32_t s = 0; s < table().num_slots; ++s) {
    const SlotId slot{s};
    if (queue_.IsIdle(slot)) continue;
    if (queue_.Cancel(slot)) planner_.Drop(slot, queue_.copied_bytes(slot));
  }
}

}  // namespace expertflow
