#pragma once

#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "cuda_timing.h"

namespace expertflow {

inline double Quantile(std::vector<double> values, double quantile) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(quantile * static_cast<double>(values.size() - 1) + 0.5)];
}

// Runs the benchmark's iterations; each is `parts` equal parts of `bytes` bytes. Returns the median
// rate.
template <class Enqueue>
double Measure(benchmark::State& state, cudaStream_t stream, double parts, double bytes,
               const Enqueue& enqueue) {
  Timer timer;
  for (int i = 0; i < 3; ++i) timer.Time(stream, enqueue);
  std::vector<double> seconds;
  for (auto _ : state) {
    seconds.push_back(timer.Time(stream, enqueue) / parts);
    state.SetIterationTime(seconds.back());
  }
  const double median = Quantile(seconds, 0.5);
  state.counters["MB"] = bytes * 1e-6;
  state.counters["us_median"] = median * 1e6;
  state.counters["us_p10"] = Quantile(seconds, 0.1) * 1e6;
  state.counters["us_p90"] = Quantile(seconds, 0.9) * 1e6;
  state.counters["GB/s"] = bytes / median * 1e-9;
  return bytes / median;
}

}  // namespace expertflow
