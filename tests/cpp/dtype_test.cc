#include "core/dtype.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

namespace expertflow {
namespace {

constexpr uint32_t kNumPatterns = 1U << 16;

template <class To, class From>
std::vector<To> Convert(const std::vector<From>& from, DType from_dtype, DType to_dtype) {
  std::vector<To> to(from.size());
  ConvertElements(reinterpret_cast<const std::byte*>(from.data()), from_dtype,
                  reinterpret_cast<std::byte*>(to.data()), to_dtype, from.size());
  return to;
}

std::vector<uint16_t> AllPatterns() {
  std::vector<uint16_t> patterns(kNumPatterns);
  for (uint32_t i = 0; i < kNumPatterns; ++i) patterns[i] = static_cast<uint16_t>(i);
  return patterns;
}

// A 16-bit format as the textbook has it: sign, exponent, fraction.
struct Format {
  DType dtype;
  int fraction_bits;
  int exponent_bias;

  int max_exponent() const { return (1 << (15 - fraction_bits)) - 1; }
  uint16_t infinity() const { return static_cast<uint16_t>(max_exponent() << fraction_bits); }

  double Decode(uint16_t bits) const {
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    const int exponent = (bits & 0x7FFF) >> fraction_bits;
    const int fraction = bits & ((1 << fraction_bits) - 1);
    if (exponent == max_exponent()) {
      return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
    }
    const int leading_one = exponent > 0 ? 1 << fraction_bits : 0;
    const int scale = std::max(exponent, 1) - exponent_bias - fraction_bits;
    return sign * std::ldexp(leading_one + fraction, scale);
  }

  // The nearest number, by a search among all; of two equally near ones the even one.
  uint16_t Encode(double value) const {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double magnitude = std::abs(value);
    uint16_t low = 0, high = infinity();  // the pattern after the largest finite number
    while (high - low > 1) {
      const auto middle = static_cast<uint16_t>((low + high) / 2);
      (Decode(middle) <= magnitude ? low : high) = middle;
    }
    if (magnitude == std::numeric_limits<double>::infinity()) return sign | infinity();
    // Infinity stands where the next power of two would.
    const double above =
        high == infinity() ? std::ldexp(1.0, max_exponent() - exponent_bias) : Decode(high);
    const double to_low = magnitude - Decode(low);
    const double to_high = above - magnitude;
    const bool take_low = to_low < to_high || (to_low == to_high && low % 2 == 0);
    return sign | (take_low ? low : high);
  }
};

constexpr Format kBFloat16Format{DType::kBFloat16, 7, 127};
constexpr Format kFloat16Format{DType::kFloat16, 10, 15};

class SixteenBitTest : public testing::TestWithParam<Format> {};

TEST_P(SixteenBitTest, WideningIsExact) {
  const Format& format = GetParam();
  const std::vector<uint16_t> patterns = AllPatterns();
  const auto wide = Convert<float>(patterns, format.dtype, DType::kFloat32);
  for (uint32_t i = 0; i < kNumPatterns; ++i) {
    const double expected = format.Decode(patterns[i]);
    ASSERT_EQ(std::isnan(wide[i]), std::isnan(expected)) << std::hex << i;
    if (std::isnan(expected)) continue;
    ASSERT_EQ(static_cast<double>(wide[i]), expected) << std::hex << i;
    ASSERT_EQ(std::signbit(wide[i]), (i & 0x8000) != 0) << std::hex << i;
  }
}

TEST_P(SixteenBitTest, SurvivesAFloat32RoundTrip) {
  const Format& format = GetParam();
  const std::vector<uint16_t> patterns = AllPatterns();
  const auto wide = Convert<float>(patterns, format.dtype, DType::kFloat32);
  const auto narrow = Convert<uint16_t>(wide, DType::kFloat32, format.dtype);
  for (uint32_t i = 0; i < kNumPatterns; ++i) {
    if (std::isnan(format.Decode(patterns[i]))) {
      ASSERT_TRUE(std::isnan(format.Decode(narrow[i]))) << std::hex << i;
    } else {
      ASSERT_EQ(narrow[i], patterns[i]) << std::hex << i;
    }
  }
}

// Every number, every midpoint between two, and both float32 neighbours of each: denormals, ties
// and the overflow to infinity among them.
TEST_P(SixteenBitTest, NarrowingRoundsToNearestEven) {
  const Format& format = GetParam();
  std::vector<float> values;
  for (uint16_t bits = 0; bits < format.infinity(); ++bits) {
    const auto value = static_cast<float>(format.Decode(bits));
    const auto next = static_cast<uint16_t>(bits + 1);
    const double above = next == format.infinity()
                             ? std::ldexp(1.0, format.max_exponent() - format.exponent_bias)
                             : format.Decode(next);
    const auto midpoint = static_cast<float>(value / 2.0 + above / 2.0);
    for (const float v : {value, midpoint}) {
      for (const float toward : {-1.0F, 1.0F}) {
        const float infinity = std::numeric_limits<float>::infinity();
        values.push_back(v);
        values.push_back(std::nextafter(v, toward * infinity));
        values.push_back(-std::nextafter(v, toward * infinity));
      }
    }
  }
  values.push_back(std::numeric_limits<float>::max());
  values.push_back(std::numeric_limits<float>::denorm_min());
  values.push_back(-std::numeric_limits<float>::infinity());
  const auto narrow = Convert<uint16_t>(values, DType::kFloat32, format.dtype);
  for (size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(narrow[i], format.Encode(values[i])) << std::hexfloat << values[i];
  }
}

TEST_P(SixteenBitTest, NanStaysNan) {
  const Format& format = GetParam();
  // Quiet, signalling, and with a payload only in the bits that narrowing cuts off.
  for (const uint32_t bits : {0x7FC00000U, 0x7F800001U, 0xFF800001U, 0x7F80FFFFU, 0xFFFFFFFFU}) {
    const std::vector<float> value = {std::bit_cast<float>(bits)};
    const auto narrow = Convert<uint16_t>(value, DType::kFloat32, format.dtype);
    EXPECT_TRUE(std::isnan(format.Decode(narrow[0]))) << std::hex << bits;
  }
}

TEST_P(SixteenBitTest, ConvertsToTheOtherFormatWithOneRounding) {
  const Format& from = GetParam();
  const Format& to = from.dtype == DType::kFloat16 ? kBFloat16Format : kFloat16Format;
  const std::vector<uint16_t> patterns = AllPatterns();
  const auto converted = Convert<uint16_t>(patterns, from.dtype, to.dtype);
  for (uint32_t i = 0; i < kNumPatterns; ++i) {
    const double value = from.Decode(patterns[i]);
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(to.Decode(converted[i]))) << std::hex << i;
    } else {
      ASSERT_EQ(converted[i], to.Encode(value)) << std::hex << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, SixteenBitTest, testing::Values(kBFloat16Format, kFloat16Format),
                         [](const testing::TestParamInfo<Format>& info) {
                           return DTypeName(info.param.dtype);
                         });

TEST(DTypeTest, SameDTypeIsCopiedBitByBit) {
  const std::vector<uint32_t> bits = {0x7F800001U, 0x80000000U, 0x00000001U, 0xDEADBEEFU};
  EXPECT_EQ(Convert<uint32_t>(bits, DType::kFloat32, DType::kFloat32), bits);
}

TEST(DTypeTest, ReadsUnalignedElements) {
  std::vector<std::byte> bytes(2 + 2 * sizeof(float));
  const float values[] = {1.5F, -3.0F};
  std::memcpy(bytes.data() + 2, values, sizeof(values));
  std::vector<uint16_t> narrow(2);
  ConvertElements(bytes.data() + 2, DType::kFloat32, reinterpret_cast<std::byte*>(narrow.data()),
                  DType::kBFloat16, 2);
  EXPECT_EQ(narrow, (std::vector<uint16_t>{0x3FC0, 0xC040}));
}

TEST(DTypeTest, NamesAndCodesAgree) {
  for (int64_t code = 0; code < 3; ++code) {
    const DType dtype = DTypeFromCode(code);
    EXPECT_EQ(ParseDType(DTypeName(dtype)), dtype);
    EXPECT_EQ(static_cast<int64_t>(dtype), code);
  }
  EXPECT_EQ(ElementBytes(DType::kFloat32), 4U);
  EXPECT_EQ(ElementBytes(DType::kBFloat16), 2U);
  EXPECT_EQ(ElementBytes(DType::kFloat16), 2U);
}

TEST(DTypeTest, RefusesWhatIsNoDType) {
  EXPECT_THROW(ParseDType("float8"), std::invalid_argument);
  EXPECT_THROW(ParseDType(""), std::invalid_argument);
  EXPECT_THROW(DTypeFromCode(-1), std::invalid_argument);
  EXPECT_THROW(DTypeFromCode(3), std::invalid_argument);
}

}  // namespace
}  // namespace expertflow
