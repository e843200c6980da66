#pragma once

#include <cstdint>
#include <type_traits>

#include "core/block_planner_shared.h"
#include "core/eviction/on_demand.h"
#include "core/host_device.h"
#include "core/ids.h"
#include "core/layer_plan.h"
#include "core/own_slots.h"
#include "core/plan_rows.h"
#include "core/planning.h"
#include "core/slot_table.h"

namespace expertflow {

// The end of a plan by a block of threads (core/block_planner.h): writes the rows, and does to the
// table and the counts what they say. Rows that are resident and rows that are missing are of
// different warps, which write them at the same time.
template <class Policy, class Block>
class BlockPlanWriter {
 public:
  // `clock` is as it was before the plan.
  EXPERTFLOW_DEVICE BlockPlanWriter(Block& block, const BlockPlannerShared& shared,
                                    const PlanningView& planning, const LayerPlanRequest& request,
                                    const PlanClock& clock, const CountedRows& rows)
      : block_(block),
        shared_(shared),
        planning_(planning),
        request_(request),
        clock_(clock),
        rows_(rows),
        now_(clock.now + 1) {}

  // The thread that writes what the plan has once: headers and counts. Its warp has few rows.
  EXPERTFLOW_DEVICE static int32_t Bookkeeper(const Block& block) {
    return block.num_threads() / 2;
  }

  // Called by all threads. `expert` is that of the thread's id, and `key` the expert's key.
  // used_key(expert, key) returns the key that an expert of the plan has from now on. Rows are
  // hits, then late hits, then misses, each in order of first appearance.
  template <class UsedKey>
  EXPERTFLOW_DEVICE void Write(LayerPlanStatus status, int32_t expert, int64_t key,
                               const UsedKey& used_key) {
    const bool planned = status == LayerPlanStatus::kPlanned;
    const int32_t miss = block_.num_threads() - 1 - block_.thread();  // from the last warp on
    const PlanRow resident = ResidentRow(expert);
    const bool has_miss = planned && miss < rows_.total.misses;
    const PlanRow missing = has_miss ? MissingRow(miss) : PlanRow{};
    Occupant evicted{};
    if (has_miss) evicted = OccupantOf(shared_.selection.victims[miss].held);
    if (planned && rows_.own >= 0) {
      const bool hit = resident.state == RowState::kHit;
      WriteRow(hit ? rows_.before.hits : rows_.total.hits + rows_.before.loading, resident);
    }
    if (has_miss) WriteRow(rows_.total.hits + rows_.total.loading + miss, missing);
    WriteHeaders(status);
    if (!planned) return;
    if constexpr (std::is_same_v<Policy, OnDemand>) {
      DropAllReady();
      evicted = {};
    }
    if (has_miss) {
      PlaceMissing(missing, evicted, used_key(missing.expert, shared_.missing[miss].key));
    }
    if (rows_.own >= 0) {
      RecordUse(planning_, resident.slot, ToIndex(resident.expert), used_key(expert, key), now_,
                /*streaming=*/false);
    }
    if (block_.thread() == Bookkeeper(block_)) Count();
  }

 private:
  EXPERTFLOW_DEVICE PlanRow ResidentRow(int32_t expert) const {
    const RowState state = Residence::InFlight(rows_.own) ? RowState::kLoading : RowState::kHit;
    return {expert, Residence::Slot(rows_.own), state, 0, kNoRow};
  }

  EXPERTFLOW_DEVICE PlanRow MissingRow(int32_t miss) const {
    return {shared_.missing[miss].expert, static_cast<SlotId>(shared_.selection.victims[miss].slot),
            RowState::kMiss, 0, kNoRow};
  }

  EXPERTFLOW_DEVICE void WriteRow(int32_t number, const PlanRow& row) {
    request_.plan->rows[number] = row;
    if (request_.host_plan != nullptr) request_.host_plan->rows[number] = row;
  }

  // What the host sees of the plan is complete when the sequence number says so.
  EXPERTFLOW_DEVICE void WriteHeaders(LayerPlanStatus status) {
    if (block_.thread() == Bookkeeper(block_)) {
      WriteHeader(*request_.plan, status);
      request_.plan->sequence = request_.clock->sequence = clock_.sequence + 1;
      if (request_.host_plan != nullptr) WriteHeader(*request_.host_plan, status);
    }
    if (request_.host_plan == nullptr) return;
    block_.Sync();
    // Takes about as long as all the rest.
    if (block_.thread() == Bookkeeper(block_)) {
      block_.Release(request_.host_plan->sequence, clock_.sequence + 1);
    }
  }

  EXPERTFLOW_DEVICE void WriteHeader(LayerPlan& plan, LayerPlanStatus status) const {
    const bool planned = status == LayerPlanStatus::kPlanned;
    plan.tick = now_;
    plan.status = status;
    plan.layer = request_.layer;
    plan.num_rows = planned ? rows_.total.rows() : 0;
    plan.num_hits = planned ? rows_.total.hits : 0;
    plan.num_loading = planned ? rows_.total.loading : 0;
  }

  // In all of the table, whatever the scope. Some states are read at once.
  EXPERTFLOW_DEVICE void DropAllReady() {
    constexpr int32_t kAtOnce = 4;
    const int32_t num_threads = block_.num_threads();
    EXPERTFLOW_NO_UNROLL
    for (int32_t first = block_.thread(); first < planning_.table.num_slots;
         first += kAtOnce * num_threads) {
      bool ready[kAtOnce];
      EXPERTFLOW_UNROLL
      for (int32_t k = 0; k < kAtOnce; ++k) {
        const int32_t s = first + k * num_threads;
        ready[k] =
            s < planning_.table.num_slots && planning_.table.slot_state[s] == SlotState::kReady;
      }
      EXPERTFLOW_UNROLL
      for (int32_t k = 0; k < kAtOnce; ++k) {
        const auto slot = static_cast<SlotId>(first + k * num_threads);
        if (ready[k]) DropIfReady(planning_, slot, Adder());
      }
    }
    block_.Sync();
  }

  EXPERTFLOW_DEVICE void PlaceMissing(const PlanRow& row, const Occupant& evicted, int64_t key) {
    PlaceMiss(planning_, row.slot, evicted, ToIndex(row.expert), key, now_,
              /*streaming=*/false, Adder());
    if (request_.fetch == MissFetch::kSameStream) {
      planning_.table.slot_state[Index(row.slot)] = SlotState::kReady;
    }
  }

  EXPERTFLOW_DEVICE void Count() {
    request_.clock->now = now_;
    LayerStatistics& counts = planning_.statistics[request_.layer];
    Adder()(counts.hits, int64_t{rows_.total.hits});
    Adder()(counts.late_hits, int64_t{rows_.total.loading});
    Adder()(counts.misses, int64_t{rows_.total.misses});
  }

  EXPERTFLOW_DEVICE auto Adder() {
    return [this](auto& counter, auto amount) { block_.Add(counter, amount); };
  }

  EXPERTFLOW_DEVICE ExpertIndex ToIndex(int32_t expert) const {
    return expertflow::ToIndex(planning_.table, {request_.layer, expert});
  }

  Block& block_;
  const BlockPlannerShared& shared_;
  const PlanningView& planning_;
  const LayerPlanRequest& request_;
  const PlanClock clock_;
  const CountedRows rows_;
  const Tick now_;
};

}  // namespace expertflow
