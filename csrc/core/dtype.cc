#include "core/dtype.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace expertflow {
namespace {

float FromBFloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

uint16_t ToBFloat16(float value) {
  if (std::isnan(value)) return 0x7FC0;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounding = 0x7FFFU + ((bits >> 16) & 1U);  // ties to even
  return static_cast<uint16_t>((bits + rounding) >> 16);
}

float Load(const std::byte* from, DType dtype, size_t i) {
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, from + 4 * i, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, from + 2 * i, 2);
  return dtype == DType::kBFloat16 ? FromBFloat16(bits)
                                   : static_cast<float>(std::bit_cast<_Float16>(bits));
}

void Store(std::byte* to, DType dtype, size_t i, float value) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to + 4 * i, &value, 4);
    return;
  }
  const uint16_t bits = dtype == DType::kBFloat16
                            ? ToBFloat16(value)
                            : std::bit_cast<uint16_t>(static_cast<_Float16>(value));
  std::memcpy(to + 2 * i, &bits, 2);
}

}  // namespace

DType ParseDType(std::string_view name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("dtype '" + std::string(name) +
                              "' is not supported: use float32, bfloat16 or float16");
}

DType DTypeFromCode(int64_t code) {
  if (code < 0 || code > 2) {
    throw std::invalid_argument("dtype code " + std::to_string(code) + " is none of 0, 1, 2");
  }
  return static_cast<DType>(code);
}

std::string DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  return "unknown";
}

void ConvertElements(const std::byte* from, DType from_dtype, std::byte* to, DType to_dtype,
                     size_t count) {
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, count * ElementBytes(to_dtype));
    return;
  }
  for (size_t i = 0; i < count; ++i) Store(to, to_dtype, i, Load(from, from_dtype, i));
}

}  // namespace expertflow
