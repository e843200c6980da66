#pragma once

#include <pybind11/pybind11.h>

namespace expertflow {

void DefinePredictor(pybind11::module_& m);

}  // namespace expertflow
