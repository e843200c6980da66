#pragma once

#include <cuda_runtime_api.h>

#include "cuda/cuda_error.h"

namespace expertflow {

// While another thread captures a CUDA graph, this one may do what has nothing to do with it, such
// as querying events or registering memory: else the driver takes that as a violation and
// invalidates the capture.
class RelaxedCapture {
 public:
  RelaxedCapture() { EXPERTFLOW_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { EXPERTFLOW_CUDA_WARN(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then what it was before
};

}  // namespace expertflow
