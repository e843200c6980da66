#pragma once

#include <pybind11/pybind11.h>

namespace expertflow {

void DefineBiasedRouter(pybind11::module_& m);

}  // namespace expertflow
