#!/bin/bash
# usage: check_on_gpu.sh [build|cpp|python|sanitize|bench|soak]...    on a machine with a GPU, nvcc and a CUDA torch.
# Builds for the GPU that is there into build/gpu, with the python3 on the PATH, and runs what needs a GPU:
# C++ tests, Python tests, C++ tests under compute-sanitizer, C++ benchmarks, the soak. Default: all.
set -uo pipefail
cd "$(dirname "$0")/.."
build=build/gpu
failed=

step() {
  echo "== $1"
  shift
  local begin=$SECONDS
  "$@" || failed=yes
  echo "== took $((SECONDS - begin)) s"
}

compile() {
  cmake -S . -B $build -G Ninja --log-level=WARNING -DPython_EXECUTABLE="$(command -v python3)" \
    -DEXPERTFLOW_CUDA=ON -DEXPERTFLOW_BUILD_TESTS=ON -DEXPERTFLOW_BUILD_BENCH=ON -DEXPERTFLOW_WERROR=ON &&
    cmake --build $build 2>&1 | grep -vE '^\[[0-9]+/' ; [ "${PIPESTATUS[0]}" = 0 ] &&
    cmake --install $build --prefix expertflow >/dev/null
}

cpp_tests() { ctest --test-dir $build -j 4 --output-on-failure --no-tests=error -E Benchmark 2>&1 | grep -vE 'Passed|Start '; }

python_tests() { PYTHONPATH=. python3 -m pytest -q --maxfail=8 tests/test_cuda.py tests/test_cuda_predictor.py; }

sanitize() {
  for tool in memcheck racecheck synccheck; do
    for tests in $build/cuda_*_test; do
      # Tests that provoke CUDA errors on purpose are none of the kernels'.
      case $tests in *cuda_error_test | *pinned_memory_test) continue ;; esac
      compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all "$tests" --gtest_brief=1 \
        --gtest_filter='-*TooLarge*:*ACapture*' 2>&1 | grep -vE '^$|COMPUTE-SANITIZER' | tail -n 5
      [ "${PIPESTATUS[0]}" = 0 ] || { echo "$tool: $tests failed"; failed=yes; }
    done
  done
}

bench() { for one in $build/cuda_*_bench; do echo "-- $one"; $one 2>/dev/null || failed=yes; done; }

[ $# -gt 0 ] || set -- build cpp python sanitize bench soak
for part in "$@"; do
  case $part in
    build) step build compile ;;
    cpp) step "C++ tests" cpp_tests ;;
    python) step "Python tests" python_tests ;;
    sanitize) step compute-sanitizer sanitize ;;
    bench) step benchmarks bench ;;
    soak) step soak env PYTHONPATH=. python3 bench/cuda/soak.py ;;
    *) echo "unknown part '$part'" >&2; exit 2 ;;
  esac
done
[ -z "$failed" ] || { echo "FAILED" >&2; exit 1; }
