#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/errors.h"
#include "core/layer_clock.h"
#include "core/plan.h"
#include "core/planner.h"
#include "core/prefetcher.h"
#include "core/slot_table.h"
#include "core/statistics.h"
#include "core/transfer_queue.h"

namespace expertflow {

struct ExpertCacheOptions {
  int32_t num_layers;
  int32_t num_experts;  // per layer
  int32_t num_slots;
  PlannerConfig planner;
  size_t chunk_bytes = size_t{1} << 20;
  size_t demand_chunk_bytes = 0;  // as for TransferQueue
  int32_t num_threads = 2;        // that copy or read
};

// All that an expert cache decides, whatever it copies with: which experts are resident or on their
// way, and which chunk is copied next. A backend adds memory, threads and copies, and serialises
// the calls. Allocates nothing after construction, but for the text of a failure.
class CacheControl {
 public:
  // `max_chunks_in_flight` as for TransferQueue. Throws std::invalid_argument for options that do
  // not fit each other.
  CacheControl(const ExpertCacheOptions& options, int32_t max_chunks_in_flight);

  // Plans a layer at `now_us` (see Planner::PlanLayer), posts its first wave and promotes what is
  // under way. The plan is valid until the next call. Returns nullptr if transfers hold every slot:
  // call CancelTransfers, finish the chunks that are out, and call again. Throws std::out_of_range
  // for bad ids.
  const Plan* BeginLayer(int32_t layer, std::span<const int64_t> expert_ids, int32_t num_tokens,
                         double now_us);

  const Plan* plan() const { return plan_; }
  // Throws std::out_of_range for a row that the current plan does not have.
  const PlanRow& RowAt(int32_t row) const;

  // Whether the row's slot is its own: its expert is there or under way. Not so before the row
  // whose slot it takes over is released, and after a failure.
  bool Owns(const PlanRow& row) const {
    return table().slot_expert[Index(row.slot)] == ExpertOf(row);
  }
  // Whether the row's expert is in its slot. Throws TransferError if it could not be brought there,
  // std::invalid_argument if the row takes over a slot that was not released.
  bool IsReady(int32_t row) const;

  // The caller is done with the slot of a row that is ready: the row that waits for the slot, if
  // any, is posted, and its number returned, or kNoRow.
  int32_t Release(int32_t row);

  // How far ahead to prefetch: Prefetcher::kAutoHorizon (so it is at first), or a fixed number of
  // layers. A cache that keeps nothing prefetches nothing. Throws std::invalid_argument.
  void set_horizon(int32_t horizon) { prefetcher_.set_horizon(horizon); }
  // Takes in what was measured up to the last plan and returns how many layers ahead to predict
  // now: `horizon`, or farther, for a trial of what that would bring (PrefetchTrial); 0: none, as
  // for a prompt. `bytes_per_second` of the link, 0 if not measured yet.
  int32_t BeginPrefetch(double bytes_per_second);
  // The same at `now_us`, when the embeddings of a pass over `num_tokens` rows are known: its layer
  // 0 is the first one ahead. Once for a pass, or never.
  int32_t BeginToken(int32_t num_tokens, double now_us);
  // Then: protects and posts of `need` [distances, num_experts] what pays, see
  // Prefetcher::PrefetchNeeded. Returns how many were posted.
  int32_t PrefetchPredicted(std::span<const float> need);
  int32_t horizon() const { return prefetcher_.horizon(); }  // how far ahead it prefetches

  // Posts the experts that `layer` will need `distance` layers from now, in this order, while slots
  // can be had. Returns how many were posted.
  int32_t Prefetch(int32_t layer, std::span<const int64_t> expert_ids, int32_t distance);

  // [num_experts] 1: the expert of `layer` is in a slot or on its way to one. Throws
  // std::out_of_range for a layer that the model does not have.
  std::vector<uint8_t> Residents(int32_t layer) const;

  // Gives every expert the slot of its own number, without a transfer; or posts them all. The cache
  // must be empty and have a slot for every expert.
  void MakeAllResident();
  void PostAll();
  // Throws TransferError if one of them could not be loaded.
  void CheckAllResident() const;

  bool HasChunk() const { return queue_.HasNext(); }
  bool HasTransfers() const { return !queue_.empty(); }
  bool NextIsDemand() const { return queue_.NextIsDemand(); }
  int32_t chunks_in_flight() const { return queue_.chunks_in_flight(); }

  // The next chunk to copy, or nothing; then how the copy ended.
  std::optional<Chunk> NextChunk();
  void FinishChunk(const Chunk& chunk, const std::optional<std::string>& error);

  // Takes back every transfer of which no chunk is out; the others end with their last chunk.
  void CancelTransfers();

  // Computation of `layer` waited; `is_late`: for a prefetch in flight.
  void RecordStall(int32_t layer, double stall_us, bool is_late);

  const SlotTableView& table() const { return table_.view(); }
  const std::vector<LayerStatistics>& statistics() const { return planner_.statistics(); }
  const PrefetchStatistics& prefetch_statistics() const { return prefetcher_.statistics(); }
  void ResetStatistics();

 private:
  ExpertIndex ExpertOf(const PlanRow& row) const {
    return ToIndex(table(), {plan_->layer, row.expert});
  }
  void PostRow(const PlanRow& row);
  void Post(SlotId slot, ExpertIndex expert, TransferClass transfer_class, Tick needed_at);
  std::optional<std::string>& FailureOf(SlotId slot) {
    return failures_[static_cast<size_t>(Index(slot))];
  }

  size_t expert_bytes_;
  SlotTable table_;
  Planner planner_;
  TransferQueue queue_;
  Prefetcher prefetcher_;
  LayerClock clock_;
  std::vector<std::optional<std::string>> failures_;  // [num_slots] of the slot's last transfer
  const Plan* plan_ = nullptr;
  Tick now_ = 0;  // of the last plan
};

}  // namespace expertflow
