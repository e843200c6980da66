#pragma once

#include <cuda_runtime_api.h>

#include "cuda/cuda_error.h"

namespace expertflow {

class Timer {
 public:
  Timer() {
    EXPERTFLOW_CUDA_CHECK(cudaEventCreate(&start_));
    EXPERTFLOW_CUDA_CHECK(cudaEventCreate(&stop_));
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() {
    EXPERTFLOW_CUDA_WARN(cudaEventDestroy(start_));
    EXPERTFLOW_CUDA_WARN(cudaEventDestroy(stop_));
  }

  // Seconds that the device spends on what `enqueue` puts on `stream`.
  template <class Enqueue>
  double Time(cudaStream_t stream, const Enqueue& enqueue) {
    EXPERTFLOW_CUDA_CHECK(cudaEventRecord(start_, stream));
    enqueue();
    EXPERTFLOW_CUDA_CHECK(cudaEventRecord(stop_, stream));
    EXPERTFLOW_CUDA_CHECK(cudaEventSynchronize(stop_));
    float milliseconds;
    EXPERTFLOW_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, start_, stop_));
    return double{milliseconds} * 1e-3;
  }

 private:
  cudaEvent_t start_;
  cudaEvent_t stop_;
};

// What `enqueue` puts on a stream, as a graph.
class Graph {
 public:
  template <class Enqueue>
  Graph(cudaStream_t stream, const Enqueue& enqueue) {
    cudaGraph_t graph;
    EXPERTFLOW_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    enqueue();
    EXPERTFLOW_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    EXPERTFLOW_CUDA_CHECK(cudaGraphInstantiate(&executable_, graph, 0));
    EXPERTFLOW_CUDA_CHECK(cudaGraphDestroy(graph));
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() { EXPERTFLOW_CUDA_WARN(cudaGraphExecDestroy(executable_)); }

  void Launch(cudaStream_t stream) const {
    EXPERTFLOW_CUDA_CHECK(cudaGraphLaunch(executable_, stream));
  }

 private:
  cudaGraphExec_t executable_;
};

}  // namespace expertflow
