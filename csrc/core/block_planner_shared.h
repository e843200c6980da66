#pragma once

#include <cstdint>

#include "core/block_need_scores.h"
#include "core/block_selection.h"
#include "core/eviction/decayed_frequency.h"
#include "core/host_device.h"
#include "core/layer_plan.h"
#include "core/own_slots.h"
#include "core/planning.h"

// What the threads share that plan a layer (core/block_planner.h).

namespace expertflow {

static_assert(kMaxBlockVictims >= kMaxRoutedIds);

// Lies in the shared memory of the block.
struct BlockPlannerShared {
  BlockSelection selection;
  alignas(16) int32_t routed[kMaxRoutedIds];  // experts, by place in the routed ids
  int32_t residence[kMaxRoutedIds];           // by place in the routed ids, see Residence
  struct MissingRow {
    int64_t key;
    int32_t expert;
  } missing[kMaxRoutedIds];
  int32_t num_bad_ids;
  uint64_t ids_known;  // a barrier of the block
  int32_t log2_table[DecayedFrequency::kTableSize];
  volatile int32_t fetched;  // of the kernel's parameters; means nothing
};

// Words of shared memory that the planner needs beside.
EXPERTFLOW_HD inline int32_t NumPlannerWords(const PlanningView& planning) {
  constexpr auto kWordsOfSlot = static_cast<int32_t>(sizeof(SlotOfLayer) / sizeof(int32_t));
  const int32_t num_experts = planning.table.num_experts;
  const int32_t num_words = (kWordsOfSlot + 1) * num_experts;
  if (planning.policy != PolicyKind::kPredictedNeed) return num_words;
  return num_words + NumScoresWords(planning.need.model);
}

}  // namespace expertflow
