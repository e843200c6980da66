#!/bin/bash
# usage: [TRACE=TRACE.npz] check_on_gpu.sh [build|cpp|python|sanitize|memcheck|racecheck|synccheck|bench|soak]...
# On a machine with a GPU, nvcc and a CUDA torch. Builds for the GPU that is there into build/gpu, with the
# python3 on the PATH, and runs what needs a GPU: C++ tests, Python tests, kernel tests under the three tools of
# compute-sanitizer (sanitize) or one of them, C++ benchmarks, the soak. Default: all. With a trace the C++ tests
# on recorded routing run, too.
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

cpp_tests() {
  if [ -n "${TRACE:-}" ]; then
    export EXPERTFLOW_TRACE=$PWD/$build/trace.npy
    python3 -c 'import sys, numpy; numpy.save(sys.argv[2], numpy.load(sys.argv[1])["expert_ids"])' \
      "$TRACE" "$EXPERTFLOW_TRACE" || return
  fi
  ctest --test-dir $build -j 4 --output-on-failure --no-tests=error -E Benchmark 2>&1 | grep -vE 'Passed|Start '
}

python_tests() { PYTHONPATH=. python3 -m pytest -q --maxfail=8 tests/test_cuda.py tests/test_cuda_predictor.py \
  tests/test_biased_weights.py::test_on_a_gpu; }

# Under a tool a launch takes milliseconds, so these are tests that run every variant of each kernel in few
# launches; the cache has one small kernel, but copies and events beside it. Prints for each: tool, test, rc, how
# many tests passed, the tool's summary. What has not ended after 75 s is stopped (rc 124).
sanitize() {
  local tool=$1 test filter log rc passed summary
  while read -r test filter; do
    log=$build/$tool-$test.log
    timeout -k 5 75 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all "$build/$test" \
      --gtest_brief=1 --gtest_filter="$filter" </dev/null >"$log" 2>&1
    rc=$?
    passed=$(sed -n 's/.*PASSED *\] \([0-9]*\) test.*/\1/p' "$log")
    summary=$(grep -o '[A-Z]* SUMMARY: .*' "$log" | tail -n 1)
    echo "$tool $test rc $rc, ${passed:-0} tests passed, ${summary:-no summary}"
    [ "$rc" = 0 ] && [ "${passed:-0}" != 0 ] && continue
    failed=yes
    tail -n 20 "$log"
  done <<'END'
cuda_planner_test *PlannerKernelSmallTest*:Small/*:PlannerKernelRefusalTest.IdsThatTheLayerLacks*
cuda_expert_mlp_test ExpertMlpTest.MatchesReference/*_bfloat16:ExpertMlpTest.NanStaysInItsToken/*:ExpertMlpTest.ReplaysFromAGraph/*
cuda_predictor_test CudaPredictorTest.ListsTheMost*:*/half_inputs:*/odd_experts:*/sigmoid_groups
cuda_weighted_sum_test WeightedSumTest.*
cuda_expert_cache_test *EveryRowIsInItsSlot*/0:*WavesOfAPrompt*/2:*ASlotIsNotOverwritten*/0
END
}

bench() { for one in $build/cuda_*_bench; do echo "-- $one"; $one 2>/dev/null || failed=yes; done; }

[ $# -gt 0 ] || set -- build cpp python sanitize bench soak
for part in "$@"; do
  case $part in
    build) step build compile ;;
    cpp) step "C++ tests" cpp_tests ;;
    python) step "Python tests" python_tests ;;
    sanitize) for tool in memcheck racecheck synccheck; do step $tool sanitize $tool; done ;;
    memcheck | racecheck | synccheck) step "$part" sanitize "$part" ;;
    bench) step benchmarks bench ;;
    soak) step soak env PYTHONPATH=. python3 bench/cuda/soak.py ;;
    *) echo "unknown part '$part'" >&2; exit 2 ;;
  esac
done
[ -z "$failed" ] || { echo "FAILED" >&2; exit 1; }
