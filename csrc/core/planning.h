#pragma once

#include <cstdint>

#include "core/eviction/decayed_frequency.h"
#include "core/eviction/lru.h"
#include "core/eviction/need_state.h"
#include "core/eviction/on_demand.h"
#include "core/eviction/policy.h"
#include "core/eviction/predicted_need.h"
#include "core/eviction/two_level_lru.h"
#include "core/host_device.h"
#include "core/plan.h"
#include "core/slot_table.h"
#include "core/statistics.h"

// What planning does to one slot or one row. The host's planner and the planner kernel are made of
// these functions, so they decide alike; each has only its own way to tell which slots may be
// taken, and to scan these for the smallest ranks. In a kernel, every row and every slot has its
// own thread: they share the counters only.

namespace expertflow {

// Above this many tokens a plan is a prompt's, not a decode step's: it leaves the policy's keys
// alone and evicts little.
constexpr int32_t kMaxDecodeTokens = 16;

// Plain data in host or device memory, passed to kernels by value.
struct PlanningView {
  SlotTableView table;
  EvictionParams eviction;
  LayerStatistics* statistics;  // [num_layers]
  PolicyKind policy;
  CacheScope scope;
  int64_t expert_bytes;
  BlockNeedState need{};  // of PolicyKind::kPredictedNeed in a kernel
};

struct SlotRange {
  int32_t begin;
  int32_t end;
};

// A slot that may be taken; the smallest rank goes first, ties go to the lower slot.
struct Candidate {
  int64_t rank;
  int32_t slot;

  EXPERTFLOW_HD friend bool operator<(const Candidate& a, const Candidate& b) {
    return (a.rank < b.rank) | ((a.rank == b.rank) & (a.slot < b.slot));
  }
};

// Calls `visit` with an object of the policy's type. The one place that maps kinds to types.
template <class Visit>
auto WithPolicy(PolicyKind policy, Visit&& visit) {
  switch (policy) {
    case PolicyKind::kDecayedFrequency:
      return visit(DecayedFrequency{});
    case PolicyKind::kTwoLevelLru:
      return visit(TwoLevelLru{});
    case PolicyKind::kPredictedNeed:
      return visit(PredictedNeed{});
    case PolicyKind::kOnDemand:
      return visit(OnDemand{});
    case PolicyKind::kLru:
      break;
  }
  return visit(Lru{});
}

// The slots that a layer may take.
EXPERTFLOW_HD inline SlotRange RangeOf(const PlanningView& planning, int32_t layer) {
  const SlotTableView& table = planning.table;
  if (planning.scope == CacheScope::kGlobal) return {0, table.num_slots};
  const int32_t quota = table.num_slots / table.num_layers;
  return {layer * quota, (layer + 1) * quota};
}

inline RowState StateOfRow(const SlotTableView& table, SlotId slot) {
  if (slot == SlotId::kNone) return RowState::kMiss;
  return InFlight(table.slot_state[Index(slot)]) ? RowState::kLoading : RowState::kHit;
}

// Whether a plan or a prefetch at tick `now` may take the slot: never one in flight or of the
// current plan, nor, if asked to, a predicted one. The kernel's rule is in core/own_slots.h.
inline bool MayTake(const SlotTableView& table, int32_t slot, Tick now, bool spare_predicted) {
  const bool in_flight = InFlight(table.slot_state[slot]);
  const bool in_plan = table.slot_needed[slot] == now;
  const bool spared = spare_predicted && table.slot_predicted[slot] >= now;
  return !(in_flight | in_plan | spared);
}

// The key of an expert that is used at tick `now` and had `key` before.
inline int64_t KeyOnUse(const PlanningView& planning, int64_t key, Tick now) {
  return WithPolicy(planning.policy, [&]<class Policy>(Policy) {
    return Policy::KeyOnUse(planning.eviction, key, now);
  });
}

// What a slot holds, for a kernel to read long before it takes the slot.
struct Occupant {
  ExpertIndex expert = ExpertIndex::kNone;
  bool unused = false;  // prefetched for nothing so far
};

EXPERTFLOW_HD inline Occupant OccupantOf(const PlanningView& planning, SlotId slot) {
  return {planning.table.slot_expert[Index(slot)], planning.table.slot_unused[Index(slot)] != 0};
}

// Counts the eviction of an expert, if it is one.
template <class Add>
EXPERTFLOW_HD inline void CountEviction(const PlanningView& planning, const Occupant& evicted,
                                        const Add& add) {
  if (evicted.expert == ExpertIndex::kNone) return;
  LayerStatistics& counts = planning.statistics[ToId(planning.table, evicted.expert).layer];
  add(counts.evictions, int64_t{1});
  if (evicted.unused) add(counts.wasted_prefetch_bytes, planning.expert_bytes);
}

// Gives `slot`, in which `evicted` is, to `expert`, which is not resident.
template <class Add>
EXPERTFLOW_HD inline void Replace(const PlanningView& planning, SlotId slot,
                                  const Occupant& evicted, ExpertIndex expert, const Add& add) {
  Assign(planning.table, slot, evicted.expert, expert, add);
  CountEviction(planning, evicted, add);
}

// The plan of tick `now` uses `expert`, which is in `slot` and has `key` from now on. A streaming
// plan leaves keys alone.
EXPERTFLOW_HD inline void RecordUse(const PlanningView& planning, SlotId slot, ExpertIndex expert,
                                    int64_t key, Tick now, bool streaming) {
  const SlotTableView& table = planning.table;
  const int32_t s = Index(slot);
  table.slot_needed[s] = now;
  table.slot_unused[s] = 0;
  if (streaming) return;
  table.slot_key[s] = table.expert_key[Index(expert)] = key;
}

// Gives `slot`, in which `evicted` is, to a missing expert of the plan of tick `now`, which has
// `key` from now on.
template <class Add>
EXPERTFLOW_HD inline void PlaceMiss(const PlanningView& planning, SlotId slot,
                                    const Occupant& evicted, ExpertIndex expert, int64_t key,
                                    Tick now, bool streaming, const Add& add) {
  Replace(planning, slot, evicted, expert, add);
  planning.table.slot_key[Index(slot)] = kStreamedKey;
  RecordUse(planning, slot, expert, key, now, streaming);
}

// What the on-demand policy does to every slot before a plan: nothing that is ready outlives one.
template <class Add>
EXPERTFLOW_HD inline void DropIfReady(const PlanningView& planning, SlotId slot, const Add& add) {
  const int32_t s = Index(slot);
  if (planning.table.slot_state[s] != SlotState::kReady) return;
  CountEviction(planning, OccupantOf(planning, slot), add);
  Unassign(planning.table, slot);
}

}  // namespace expertflow
