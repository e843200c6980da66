#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/eviction/policy.h"

namespace expertflow {

// Least frequently used, where every past use counts decay^age, also uses from before the expert
// was last evicted.
//
// Kept as a logarithm that grows instead of a frequency that decays (as the CRF of LRFU, Lee et
// al., IEEE ToC 2001), so that a key changes on use only and keys of different ages compare as they
// are:
//   f(t) = sum over uses u of decay^(t-u),    key = log2 f(t) + t * log2(1/decay)
// A use turns f into 1 + f, i.e. log2 f = x into log2(1 + 2^x), which a table of integers
// interpolates: host and device agree.
struct DecayedFrequency {
  static constexpr int32_t kFractionBits = 24;
  static constexpr int32_t kStepBits = 20;    // table step: 2^-4
  static constexpr int32_t kTableHalf = 256;  // the table covers x in [-16, 16]
  static constexpr int32_t kTableSize = 2 * kTableHalf + 1;
  static constexpr int32_t kTieBits = 0;
  using Log2Table = std::array<int32_t, size_t{kTableSize}>;

  // What `EvictionParams` holds for this policy.
  static Log2Table MakeLog2Table();
  static int64_t DecayPerTickQ24(double decay_per_token, Tick ticks_per_token);

  // log2(1 + 2^x), `x` and the result with 24 fraction bits.
  EXPERTFLOW_HD static int64_t Log2OnePlusExp2(const int32_t* table, int64_t x) {
    const int64_t limit = int64_t{kTableHalf} << kStepBits;
    if (x < -limit) return 0;
    if (x >= limit) return x;
    const int64_t position = x + limit;
    const int64_t i = position >> kStepBits;
    const int64_t rest = position & ((int64_t{1} << kStepBits) - 1);
    return table[i] + (((table[i + 1] - table[i]) * rest) >> kStepBits);
  }

  EXPERTFLOW_HD static int64_t KeyOnUse(const EvictionParams& params, int64_t key, Tick now) {
    const int64_t growth = now * params.decay_per_tick_q24;
    return growth + Log2OnePlusExp2(params.log2_1p_exp2_q24, key - growth);
  }

  // Protects what the last token used: else, in a table that all layers share, an expert that was
  // just fetched has the lowest frequency of all and would lose its slot to the next layer before
  // it could be used again. And what is predicted inside the horizon, as the two-level LRU does: a
  // prefetched expert is mostly one of low frequency.
  EXPERTFLOW_HD static bool IsProtected(const EvictionParams& params, const SlotUse& slot,
                                        Tick now) {
    const bool just_used = slot.needed > now - params.protected_ticks;
    const bool predicted = slot.predicted >= now;
    return (slot.key >= 0) & (just_used | predicted);
  }

  EXPERTFLOW_HD static int64_t Origin(const EvictionParams& params, Tick now) {
    return now * params.decay_per_tick_q24;
  }
};

}  // namespace expertflow
