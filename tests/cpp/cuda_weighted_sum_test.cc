#include "cuda/weighted_sum.h"

#include <gtest/gtest.h>

#include <random>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda_test.h"
#include "device_buffer.h"
#include "expert_mlp_reference.h"

namespace expertflow {
namespace {

constexpr int32_t kHidden = 264;

float Round(float value, DType dtype) { return ToFloats(ToBytes({value}, dtype), dtype)[0]; }

class WeightedSumTest : public CudaTest,
                        public ::testing::WithParamInterface<std::tuple<DType, DType>> {};

// All the roundings are prescribed, so the bits are.
TEST_P(WeightedSumTest, HasTheBitsOfTheHost) {
  const auto [dtype, weights_dtype] = GetParam();
  std::mt19937 random(TestSeed());
  for (const int32_t num_tokens : {1, 16, 100}) {
    const int32_t top_k = num_tokens == 16 ? 8 : 3;
    const auto num_pairs = static_cast<size_t>(num_tokens * top_k);
    const std::vector<float> partial = RandomValues(num_pairs * kHidden, 1, dtype, random);
    const std::vector<float> weights = RandomValues(num_pairs, 0.3, weights_dtype, random);
    std::vector<float> expected;
    for (size_t i = 0; i < static_cast<size_t>(num_tokens) * kHidden; ++i) {
      float sum = 0;
      for (size_t j = 0; j < static_cast<size_t>(top_k); ++j) {
        const size_t pair = i / kHidden * static_cast<size_t>(top_k) + j;
        sum += Round(partial[pair * kHidden + i % kHidden] * weights[pair], weights_dtype);
      }
      expected.push_back(Round(Round(sum, weights_dtype), dtype));
    }
    DeviceBuffer device_partial(ToBytes(partial, dtype));
    DeviceBuffer device_weights(ToBytes(weights, weights_dtype));
    DeviceBuffer output(expected.size() * ElementBytes(dtype));
    LaunchWeightedSum({.partial = device_partial.data(),
                       .weights = device_weights.data(),
                       .output = output.data(),
                       .num_tokens = num_tokens,
                       .top_k = top_k,
                       .hidden = kHidden,
                       .dtype = dtype,
                       .weights_dtype = weights_dtype},
                      nullptr);
    EXPECT_EQ(output.Read(), ToBytes(expected, dtype));
  }
}

INSTANTIATE_TEST_SUITE_P(, WeightedSumTest,
                         ::testing::Values(std::tuple(DType::kBFloat16, DType::kBFloat16),
                                           std::tuple(DType::kBFloat16, DType::kFloat32),
                                           std::tuple(DType::kFloat16, DType::kFloat16),
                                           std::tuple(DType::kFloat16, DType::kFloat32),
                                           std::tuple(DType::kFloat32, DType::kFloat32)),
                         [](const auto& info) {
                           return DTypeName(std::get<0>(info.param)) + "_by_" +
                                  DTypeName(std::get<1>(info.param));
                         });

TEST(WeightedSumArgumentsTest, OtherDTypesAndSizesAreRefused) {
  WeightedSum sum = {nullptr, nullptr, nullptr, 1, 1, 8, DType::kFloat16, DType::kBFloat16};
  EXPECT_THROW(LaunchWeightedSum(sum, nullptr), std::invalid_argument);
  sum.weights_dtype = DType::kFloat32;
  sum.num_tokens = 0;
  EXPECT_THROW(LaunchWeightedSum(sum, nullptr), std::invalid_argument);
}

}  // namespace
}  // namespace expertflow
