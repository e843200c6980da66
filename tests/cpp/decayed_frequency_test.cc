#include "core/eviction/decayed_frequency.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace expertflow {
namespace {

constexpr double kOne = 1 << DecayedFrequency::kFractionBits;

class DecayedFrequencyTest : public testing::TestWithParam<double> {
 protected:
  static constexpr Tick kTicksPerToken = 48;

  double decay_per_tick() const { return std::pow(GetParam(), 1.0 / kTicksPerToken); }

  DecayedFrequency::Log2Table log2_table_ = DecayedFrequency::MakeLog2Table();
  EvictionParams params_{kTicksPerToken,
                         DecayedFrequency::DecayPerTickQ24(GetParam(), kTicksPerToken),
                         log2_table_.data()};
};

// The integer keys of many experts with random uses order like frequencies in double precision,
// wherever those differ by more than the interpolation can err.
TEST_P(DecayedFrequencyTest, RanksAsDoublePrecisionDoes) {
  constexpr size_t kNumExperts = 64;
  constexpr Tick kNumTicks = 20000;
  constexpr double kTolerance = 2e-3;  // of log2 f
  std::mt19937_64 random(3);
  std::vector<double> weights(kNumExperts);
  for (size_t e = 0; e < kNumExperts; ++e) weights[e] = 1.0 / static_cast<double>(e + 1);
  std::discrete_distribution<size_t> draw(weights.begin(), weights.end());
  std::vector<int64_t> keys(kNumExperts, kNeverUsed);
  std::vector<double> frequencies(kNumExperts, 0.0);
  for (Tick now = 1; now <= kNumTicks; ++now) {
    for (double& f : frequencies) f *= decay_per_tick();
    const size_t used = draw(random);
    frequencies[used] += 1.0;
    const int64_t before = keys[used];
    keys[used] = DecayedFrequency::KeyOnUse(params_, before, now);
    ASSERT_GE(keys[used], 0) << "negative keys are reserved";
    if (now % 500 != 0) continue;
    for (size_t a = 0; a < kNumExperts; ++a) {
      for (size_t b = 0; b < kNumExperts; ++b) {
        const double difference = std::log2(frequencies[a]) - std::log2(frequencies[b]);
        if (frequencies[b] > 0.0 && difference > kTolerance) {
          ASSERT_GT(keys[a], keys[b]) << "experts " << a << " and " << b << " at tick " << now;
        }
      }
    }
  }
}

TEST_P(DecayedFrequencyTest, KeyIsTheLogarithmOfTheFrequency) {
  double frequency = 0.0;
  int64_t key = kNeverUsed;
  Tick last = 0;
  for (const Tick now : {1, 2, 5, 40, 41, 42, 43, 1000, 1001, 50000}) {
    frequency = frequency * std::pow(decay_per_tick(), static_cast<double>(now - last)) + 1.0;
    last = now;
    key = DecayedFrequency::KeyOnUse(params_, key, now);
    const auto growth = static_cast<double>(now * params_.decay_per_tick_q24);
    EXPECT_NEAR((static_cast<double>(key) - growth) / kOne, std::log2(frequency), 2e-3);
  }
}

INSTANTIATE_TEST_SUITE_P(Decays, DecayedFrequencyTest, testing::Values(0.5, 0.9, 0.98, 1.0),
                         [](const testing::TestParamInfo<double>& info) {
                           return "Percent" + std::to_string(std::lround(100 * info.param));
                         });

TEST(Log2OnePlusExp2Test, FollowsDoublePrecisionAndNeverFalls) {
  const DecayedFrequency::Log2Table table = DecayedFrequency::MakeLog2Table();
  const double limit = DecayedFrequency::kTableHalf / 16.0;
  int64_t last = 0;
  for (double x = -limit - 2.0; x < limit + 2.0; x += 0.003) {
    const auto fixed = static_cast<int64_t>(x * kOne);
    const int64_t found = DecayedFrequency::Log2OnePlusExp2(table.data(), fixed);
    EXPECT_NEAR(static_cast<double>(found) / kOne, std::log2(1.0 + std::exp2(x)), 1e-4) << x;
    EXPECT_GE(found, last - static_cast<int64_t>(5e-5 * kOne)) << x;
    last = found;
  }
}

}  // namespace
}  // namespace expertflow
