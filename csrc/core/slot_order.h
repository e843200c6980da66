#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/host_device.h"
#include "core/planning.h"

// How a block of threads compares the slots that a plan may take (core/block_selection.h): by their
// ranks, or, in one register, by orders.

namespace expertflow {

constexpr int64_t kNoRank = std::numeric_limits<int64_t>::max();     // above every rank
constexpr uint32_t kNoOrder = std::numeric_limits<uint32_t>::max();  // above every order
constexpr int32_t kHighestSlot = std::numeric_limits<int32_t>::max();

// A Candidate with what its slot holds, so that nobody looks for that later.
struct SlotCandidate {
  int64_t rank;
  int32_t slot;
  int32_t held;  // not compared

  EXPERTFLOW_HD friend bool operator<(const SlotCandidate& a, const SlotCandidate& b) {
    return (a.rank < b.rank) | ((a.rank == b.rank) & (a.slot < b.slot));
  }
};

EXPERTFLOW_HD inline uint32_t Smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

template <size_t kCount>
EXPERTFLOW_DEVICE uint32_t Smallest(const uint32_t (&orders)[kCount]) {
  uint32_t smallest = orders[0];
  EXPERTFLOW_UNROLL
  for (size_t k = 1; k < kCount; ++k) smallest = Smaller(smallest, orders[k]);
  return smallest;
}

// Grows with (rank, slot), or stays; the rank is `key`, or above all that are not protected. Tells
// keys apart that lie within 2^(30 - kTieBits) of `origin`, of empty slots the first, and by
// kTieBits the first slots of equal keys; the rest is left to the list. In few instructions of 32
// bits.
template <int32_t kTieBits>
EXPERTFLOW_HD inline uint32_t OrderOf(int64_t key, int32_t slot, bool is_protected,
                                      int64_t origin) {
  constexpr uint32_t kNumEmpty = 1U << 16;
  constexpr uint32_t kHighest = (uint32_t{1} << 31) - 2 - kNumEmpty;
  constexpr uint32_t kLastTie = (uint32_t{1} << kTieBits) - 1;
  const uint64_t distance =
      static_cast<uint64_t>(key) - static_cast<uint64_t>(origin) + (uint32_t{1} << (30 - kTieBits));
  const auto high = static_cast<int32_t>(distance >> 32);
  const auto low = static_cast<uint32_t>(distance);
  const auto number = static_cast<uint32_t>(slot);
  const uint32_t told_apart = (low << kTieBits) + Smaller(number, kLastTie);
  const bool is_highest = (high > 0) | (low >= kHighest >> kTieBits);
  const uint32_t at_most = is_highest ? kHighest : told_apart;
  // The distance of an empty slot overflows.
  const bool is_lowest = (high < 0) | ((key < 0) & !is_protected);
  const uint32_t base = key == kEmptyKey ? Smaller(number, kNumEmpty) : kNumEmpty;
  return (base + (is_lowest ? 0 : at_most)) | (is_protected ? uint32_t{1} << 31 : 0U);
}

}  // namespace expertflow
