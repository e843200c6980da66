#pragma once

#include <pybind11/pybind11.h>

namespace expertflow {

// Adds CudaPredictor to the module, if the CUDA backend was built.
void DefineCudaPredictor(pybind11::module_& m);

}  // namespace expertflow
