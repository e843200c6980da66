#pragma once

#include <cstdint>

namespace expertflow {

// What one MoE layer cost since the last reset. An expert counts once per plan, however many tokens
// it has.
struct LayerStatistics {
  int64_t hits = 0;
  int64_t late_hits = 0;  // a prefetch was still in flight when the expert was needed
  int64_t misses = 0;
  int64_t demand_bytes = 0;    // moved because an expert was missing
  int64_t prefetch_bytes = 0;  // moved because an expert was foreseen
  int64_t wasted_prefetch_bytes =
      0;  // part of prefetch_bytes whose expert was evicted or dropped before any use
  int64_t evictions = 0;
  double stall_us = 0.0;  // the compute thread waited this long

  LayerStatistics& operator+=(const LayerStatistics& other) {
    hits += other.hits;
    late_hits += other.late_hits;
    misses += other.misses;
    demand_bytes += other.demand_bytes;
    prefetch_bytes += other.prefetch_bytes;
    wasted_prefetch_bytes += other.wasted_prefetch_bytes;
    evictions += other.evictions;
    stall_us += other.stall_us;
    return *this;
  }
};

}  // namespace expertflow
