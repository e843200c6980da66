#pragma once

#include <cstdint>
#include <vector>

#include "core/ids.h"
#include "core/plan.h"
#include "core/slot_table.h"

namespace expertflow {

// What became of prefetched experts, slot by slot, seen from the outside: the planner decides, and
// whoever drives it reports its plans and prefetches here, in order.
class PrefetchLedger {
 public:
  // Of prefetched experts, since the counts were taken last.
  struct Counts {
    int32_t used = 0;    // needed by a plan for the first time
    int32_t ready = 0;   // part of used: there in time
    int32_t wasted = 0;  // evicted without a use
    // What they had evicted was missed before they were evicted themselves or, at the latest by the
    // same plan, used: a demand would have chosen its victim knowing what that plan needs.
    int32_t regretted = 0;
  };

  explicit PrefetchLedger(const SlotTableView& table);

  // A plan was made. Rows of later waves count as if they were in their slots already.
  void RecordPlan(const Plan& plan);
  // `slot` was given to `expert` at tick `now` (Planner::PlanPrefetch).
  void RecordPrefetch(SlotId slot, ExpertId expert, Tick now);

  // The prefetch into `slot` was taken back before anything was copied (Planner::Withdraw). It is
  // neither used nor wasted.
  void RecordWithdrawal(SlotId slot);

  // The prefetch into `slot` was given up after some of it was copied (Planner::Drop): it is
  // wasted.
  void RecordDrop(SlotId slot);

  Counts TakeCounts();

 private:
  struct Holder {
    ExpertIndex expert = ExpertIndex::kNone;
    bool is_unused = false;                    // prefetched and not needed yet
    ExpertIndex evicted = ExpertIndex::kNone;  // by that prefetch
    Tick since = kNever;
  };

  void RecordRow(const PlanRow& row, const Plan& plan);
  void Leave(const Holder& holder);
  bool IsRegretted(const Holder& holder) const;

  SlotTableView table_;
  std::vector<Holder> holders_;  // [num_slots]
  std::vector<Tick> missed_at_;  // [num_layers * num_experts] the last miss
  Counts counts_;
};

}  // namespace expertflow
