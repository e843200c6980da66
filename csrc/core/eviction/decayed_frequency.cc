#include "core/eviction/decayed_frequency.h"

#include <cmath>

namespace expertflow {
namespace {

constexpr double kOne = int64_t{1} << DecayedFrequency::kFractionBits;
constexpr double kStep = int64_t{1} << DecayedFrequency::kStepBits;

}  // namespace

DecayedFrequency::Log2Table DecayedFrequency::MakeLog2Table() {
  Log2Table table;
  for (int32_t i = 0; i < kTableSize; ++i) {
    const double x = (i - kTableHalf) * (kStep / kOne);
    table[static_cast<size_t>(i)] =
        static_cast<int32_t>(std::lround(std::log2(1.0 + std::exp2(x)) * kOne));
  }
  return table;
}

int64_t DecayedFrequency::DecayPerTickQ24(double decay_per_token, Tick ticks_per_token) {
  return std::llround(-std::log2(decay_per_token) * kOne / static_cast<double>(ticks_per_token));
}

}  // namespace expertflow
