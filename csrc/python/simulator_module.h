#pragma once

#include <pybind11/pybind11.h>

namespace expertflow {

// Adds `simulate`; expertflow/simulation.py is its Python face.
void DefineSimulator(pybind11::module_& m);

}  // namespace expertflow
