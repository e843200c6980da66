#pragma once

#include <cstdint>
#include <span>

#include "core/ids.h"

namespace expertflow {

enum class RowState : int32_t {
  kHit,      // ready when planned
  kLoading,  // a prefetch of it was in flight: a late hit
  kMiss,     // must be fetched
};

constexpr int32_t kNoRow = -1;

// One expert that the layer needs, with all its tokens.
struct PlanRow {
  int32_t expert;
  SlotId slot;
  RowState state;
  int32_t wave;      // rows of wave w > 0 take over a slot from a row of wave w - 1
  int32_t next_row;  // the row that takes over this row's slot once it is released, or kNoRow
};

// What one layer needs and where it will be: hits first, then late hits, then misses, each in order
// of first appearance.
struct Plan {
  int32_t layer = 0;
  Tick tick = -1;
  bool streaming = false;  // a prompt's plan: takes few slots, and what it brings in goes first
  std::span<const PlanRow> rows;
  int32_t num_hits = 0;
  int32_t num_loading = 0;
  int32_t num_waves = 1;
};

}  // namespace expertflow
