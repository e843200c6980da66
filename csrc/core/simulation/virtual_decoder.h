#pragma once

#include <cstdint>
#include <span>

#include "core/ids.h"
#include "core/plan.h"
#include "core/planner.h"
#include "core/simulation/virtual_transfers.h"

namespace expertflow {

// Decodes layer by layer under a virtual clock, as the simulator and a shadow cache do: plans them,
// moves what is missing, computes the experts one after the other, resident ones first, and waits
// for those that are not there yet. Times are nanoseconds since the start.
class VirtualDecoder {
 public:
  // What computation costs beside its own time.
  struct Costs {
    double copy_slowdown = 0.0;  // while copies are under way, as a share
    int64_t miss_ns = 0;         // for each expert that is not there when its layer is planned
  };

  // Keeps the references.
  VirtualDecoder(Planner& planner, VirtualTransfers& transfers, const Costs& costs);

  void Compute(int64_t work_ns);

  // Plans one token's `experts` of a layer. Where transfers hold every slot, they are taken back.
  const Plan& PlanLayer(int32_t layer, std::span<const int64_t> experts, Tick tick);
  void PostMisses(const Plan& plan);
  // Calls taken(slot) for every slot that a later wave of the plan takes over, before it is filled.
  template <class Taken>
  void ComputeExperts(const Plan& plan, int64_t experts_ns, const Taken& taken) {
    const auto num_rows = static_cast<int64_t>(plan.rows.size());
    for (int64_t r = 0; r < num_rows; ++r) {
      const PlanRow& row = plan.rows[static_cast<size_t>(r)];
      if (row.state != RowState::kHit) Compute(costs_.miss_ns);
      AwaitRow(row);
      Compute(experts_ns * (r + 1) / num_rows - experts_ns * r / num_rows);
      const int32_t next = planner_.Advance(static_cast<int32_t>(r));
      if (next == kNoRow) continue;
      const SlotId slot = plan.rows[static_cast<size_t>(next)].slot;
      taken(slot);
      transfers_.Post(slot, TransferClass::kDemand, plan.tick, now_ns_);
    }
  }

  int64_t now_ns() const { return now_ns_; }
  // Since the last reset.
  int64_t compute_ns() const { return compute_ns_; }
  int64_t stall_ns() const { return stall_ns_; }
  int64_t late_stall_ns() const { return late_stall_ns_; }  // waiting for prefetches in flight
  void ResetComputed() { compute_ns_ = 0; }
  void ResetStalls() { stall_ns_ = late_stall_ns_ = 0; }

 private:
  void AwaitRow(const PlanRow& row);

  Planner& planner_;
  VirtualTransfers& transfers_;
  Costs costs_;
  int64_t now_ns_ = 0;
  int64_t compute_ns_ = 0;
  int64_t stall_ns_ = 0;
  int64_t late_stall_ns_ = 0;
};

}  // namespace expertflow
