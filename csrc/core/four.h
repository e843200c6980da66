#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace expertflow {

// Four neighbours of an array, which a kernel reads at once.
template <class T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Four {
  T of[4];
};

// `first` is a multiple of four, and the array is aligned for that.
template <class T>
EXPERTFLOW_HD inline Four<T> ReadFour(const T* array, int32_t first) {
  return *reinterpret_cast<const Four<T>*>(array + first);
}

// The same of bytes, as a word whose lowest byte is the first: a kernel takes it apart only where
// it needs them, and does not wait for them before.
template <class Byte>
EXPERTFLOW_HD inline uint32_t ReadFourBytes(const Byte* array, int32_t first) {
  static_assert(sizeof(Byte) == 1);
  using Word [[gnu::may_alias]] = uint32_t;
  return *reinterpret_cast<const Word*>(array + first);
}

}  // namespace expertflow
