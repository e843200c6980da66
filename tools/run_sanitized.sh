#!/bin/sh
# usage: run_sanitized.sh NAME SANITIZERS    builds core and host in build/NAME and runs their C++ tests.
set -eu

cmake -S . -B "build/$1" -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Debug \
  -DCMAKE_CXX_FLAGS="-O1 -D_GLIBCXX_ASSERTIONS" -DEXPERTFLOW_SANITIZE="$2" -DEXPERTFLOW_WERROR=ON \
  -DEXPERTFLOW_PYTHON=OFF -DEXPERTFLOW_CUDA=OFF -DEXPERTFLOW_BUILD_TESTS=ON
cmake --build "build/$1"

# Where addresses are randomized further than this TSan knows, it stops at start: run without.
fixed_addresses=
if setarch -R true 2>/dev/null; then fixed_addresses="setarch -R"; fi
$fixed_addresses ctest --test-dir "build/$1" --output-on-failure --no-tests=error -j 2
