#pragma once

#include <pybind11/pybind11.h>

namespace expertflow {

// How this binary was built, and the GPUs of this machine; expertflow/build_info.py documents the
// entries.
pybind11::dict BuildInfo();

}  // namespace expertflow
