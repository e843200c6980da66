#pragma once

#include <pybind11/pybind11.h>

namespace expertflow {

// Adds the classes of the CUDA backend, if it was built.
void DefineCuda(pybind11::module_& m);

}  // namespace expertflow
