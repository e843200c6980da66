#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "core/dtype.h"
#include "core/expert_layout.h"
#include "cuda/expert_mlp.h"

namespace expertflow {

inline std::vector<std::byte> ToBytes(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * ElementBytes(dtype));
  ConvertElements(reinterpret_cast<const std::byte*>(values.data()), DType::kFloat32, bytes.data(),
                  dtype, values.size());
  return bytes;
}

inline std::vector<float> ToFloats(const std::vector<std::byte>& bytes, DType dtype) {
  std::vector<float> values(bytes.size() / ElementBytes(dtype));
  ConvertElements(bytes.data(), dtype, reinterpret_cast<std::byte*>(values.data()), DType::kFloat32,
                  values.size());
  return values;
}

// Set by --gtest_random_seed.
inline auto TestSeed() {
  return static_cast<std::mt19937::result_type>(::testing::UnitTest::GetInstance()->random_seed());
}

// Normal values, rounded to `dtype`.
inline std::vector<float> RandomValues(size_t count, double deviation, DType dtype,
                                       std::mt19937& random) {
  std::normal_distribution<float> normal(0.0F, static_cast<float>(deviation));
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return ToFloats(ToBytes(values, dtype), dtype);
}

// A random expert, and what it makes of a token in double precision.
class ReferenceExpert {
 public:
  ReferenceExpert(ExpertMlpKind kind, DType dtype, int32_t hidden, int32_t intermediate,
                  std::mt19937& random)
      : kind_(kind),
        hidden_(static_cast<size_t>(hidden)),
        intermediate_(static_cast<size_t>(intermediate)) {
    // Gates of deviation 4: some are beyond the limit of 7.
    const double scale = 4 / std::sqrt(hidden_);
    gate_up_ = RandomValues(2 * intermediate_ * hidden_, scale, dtype, random);
    down_ = RandomValues(hidden_ * intermediate_, 1 / std::sqrt(intermediate_), dtype, random);
    gate_up_bias_ = RandomValues(2 * intermediate_, 1, dtype, random);
    down_bias_ = RandomValues(hidden_, 1, dtype, random);
  }

  std::vector<SegmentSpec> Segments(DType dtype) const {
    return {{"gate_up_proj", dtype, gate_up_.size()},
            {"gate_up_proj_bias", dtype, gate_up_bias_.size()},
            {"down_proj", dtype, down_.size()},
            {"down_proj_bias", dtype, down_bias_.size()}};
  }

  // In the order of Segments().
  std::vector<const std::vector<float>*> Values() const {
    return {&gate_up_, &gate_up_bias_, &down_, &down_bias_};
  }

  std::vector<double> Apply(const float* x) const {
    std::vector<double> activation(intermediate_);
    for (size_t i = 0; i < intermediate_; ++i) activation[i] = Activation(x, i);
    std::vector<double> output(hidden_, 0.0);
    for (size_t o = 0; o < hidden_; ++o) {
      for (size_t i = 0; i < intermediate_; ++i) {
        const size_t at = is_gpt_oss() ? i * hidden_ + o : o * intermediate_ + i;
        output[o] += double{down_[at]} * activation[i];
      }
      if (is_gpt_oss()) output[o] += double{down_bias_[o]};
    }
    return output;
  }

 private:
  bool is_gpt_oss() const { return kind_ == ExpertMlpKind::kGptOss; }

  double GateUp(const float* x, size_t output) const {
    double sum = is_gpt_oss() ? double{gate_up_bias_[output]} : 0.0;
    for (size_t i = 0; i < hidden_; ++i) {
      const size_t at = is_gpt_oss() ? i * 2 * intermediate_ + output : output * hidden_ + i;
      sum += double{gate_up_[at]} * double{x[i]};
    }
    return sum;
  }

  double Activation(const float* x, size_t i) const {
    if (!is_gpt_oss()) {
      const double gate = GateUp(x, i);
      return gate / (1 + std::exp(-gate)) * GateUp(x, intermediate_ + i);
    }
    const double gate = std::min(GateUp(x, 2 * i), 7.0);
    const double up = std::clamp(GateUp(x, 2 * i + 1), -7.0, 7.0);
    return (up + 1) * gate / (1 + std::exp(-1.702 * gate));
  }

  ExpertMlpKind kind_;
  size_t hidden_;
  size_t intermediate_;
  std::vector<float> gate_up_;
  std::vector<float> gate_up_bias_;
  std::vector<float> down_;
  std::vector<float> down_bias_;
};

}  // namespace expertflow
