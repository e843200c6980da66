#pragma once

#include <pybind11/numpy.h>

#include <cstddef>
#include <span>

namespace expertflow {

// An argument that numpy converts if it must.
template <class T>
using Array = pybind11::array_t<T, pybind11::array::c_style | pybind11::array::forcecast>;

template <class T>
std::span<const T> Values(const Array<T>& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

}  // namespace expertflow
