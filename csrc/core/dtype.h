#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace expertflow {

// The values are the dtype codes that Python passes in extents.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr size_t ElementBytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Throws std::invalid_argument for a name or code that is none of the three.
DType ParseDType(std::string_view name);
DType DTypeFromCode(int64_t code);
std::string DTypeName(DType dtype);

// Converts `count` elements as torch's Tensor.to does: widening is exact, narrowing rounds to
// nearest even. `to` and `from` must not overlap.
void ConvertElements(const std::byte* from, DType from_dtype, std::byte* to, DType to_dtype,
                     size_t count);

}  // namespace expertflow
