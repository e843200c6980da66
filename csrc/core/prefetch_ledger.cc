#include "core/prefetch_ledger.h"

#include <cstddef>
#include <utility>

namespace expertflow {

PrefetchLedger::PrefetchLedger(const SlotTableView& table)
    : table_(table),
      holders_(static_cast<size_t>(table.num_slots)),
      missed_at_(static_cast<size_t>(table.num_layers) * static_cast<size_t>(table.num_experts),
                 kNever) {}

void PrefetchLedger::RecordPlan(const Plan& plan) {
  for (const PlanRow& row : plan.rows) {
    if (row.state != RowState::kMiss) continue;
    missed_at_[static_cast<size_t>(Index(ToIndex(table_, {plan.layer, row.expert})))] = plan.tick;
  }
  for (const PlanRow& row : plan.rows) RecordRow(row, plan);
}

void PrefetchLedger::RecordRow(const PlanRow& row, const Plan& plan) {
  Holder& holder = holders_[static_cast<size_t>(Index(row.slot))];
  const ExpertIndex expert = ToIndex(table_, {plan.layer, row.expert});
  if (row.state == RowState::kMiss) {
    Leave(holder);
    holder = {.expert = expert};
  } else if (holder.is_unused) {
    holder.is_unused = false;
    ++counts_.used;
    counts_.regretted += IsRegretted(holder);
    counts_.ready += row.state == RowState::kHit;
  }
}

void PrefetchLedger::RecordPrefetch(SlotId slot, ExpertId expert, Tick now) {
  Holder& holder = holders_[static_cast<size_t>(Index(slot))];
  Leave(holder);
  holder = {
      .expert = ToIndex(table_, expert), .is_unused = true, .evicted = holder.expert, .since = now};
}

void PrefetchLedger::RecordWithdrawal(SlotId slot) {
  Holder& holder = holders_[static_cast<size_t>(Index(slot))];
  counts_.regretted += IsRegretted(holder);
  holder = {.expert = table_.slot_expert[Index(slot)]};
}

void PrefetchLedger::RecordDrop(SlotId slot) {
  Holder& holder = holders_[static_cast<size_t>(Index(slot))];
  Leave(holder);
  holder = {};
}

void PrefetchLedger::Leave(const Holder& holder) {
  if (!holder.is_unused) return;
  ++counts_.wasted;
  counts_.regretted += IsRegretted(holder);
}

bool PrefetchLedger::IsRegretted(const Holder& holder) const {
  return holder.evicted != ExpertIndex::kNone &&
         missed_at_[static_cast<size_t>(Index(holder.evicted))] > holder.since;
}

PrefetchLedger::Counts PrefetchLedger::TakeCounts() { return std::exchange(counts_, Counts{}); }

}  // namespace expertflow
