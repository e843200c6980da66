#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <type_traits>

#include "cuda/cuda_error.h"

namespace expertflow {

// A point in a stream's work, on the device that is current when it is made. Keeps no time unless
// asked to: such events are cheaper to record and to wait for. Streams are raw handles here,
// because the caller's stream may be torch's.
class CudaEvent {
 public:
  enum class Timing { kOff, kOn };

  explicit CudaEvent(Timing timing = Timing::kOff) {
    cudaEvent_t event;
    const unsigned flags = timing == Timing::kOn ? cudaEventDefault : cudaEventDisableTiming;
    EXPERTFLOW_CUDA_CHECK(cudaEventCreateWithFlags(&event, flags));
    event_.reset(event);
  }

  cudaEvent_t get() const { return event_.get(); }

  // The event now stands for all that was enqueued on `stream` so far.
  void Record(cudaStream_t stream) { EXPERTFLOW_CUDA_CHECK(cudaEventRecord(event_.get(), stream)); }

  // What is enqueued on `stream` from now on starts after the event. The host does not wait.
  void MakeWait(cudaStream_t stream) const {
    EXPERTFLOW_CUDA_CHECK(cudaStreamWaitEvent(stream, event_.get(), 0));
  }

  // Whether it has happened; an event that was never recorded has. Throws CudaError if the work
  // before it failed.
  bool IsDone() const {
    const cudaError_t code = cudaEventQuery(event_.get());
    if (code == cudaErrorNotReady) {
      cudaGetLastError();  // "not ready" is no failure that a later check should find
      return false;
    }
    CheckCuda(code, "cudaEventQuery", __FILE__, __LINE__);
    return true;
  }

  // Microseconds since an earlier event; both must have happened and keep time.
  double ElapsedUs(const CudaEvent& since) const {
    float elapsed_ms = 0.0F;
    EXPERTFLOW_CUDA_CHECK(cudaEventElapsedTime(&elapsed_ms, since.get(), get()));
    return static_cast<double>(elapsed_ms) * 1000.0;
  }

  // Blocks the host until it has happened.
  void Synchronize() const { EXPERTFLOW_CUDA_CHECK(cudaEventSynchronize(event_.get())); }

 private:
  struct Destroy {
    void operator()(cudaEvent_t event) const { EXPERTFLOW_CUDA_WARN(cudaEventDestroy(event)); }
  };
  std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, Destroy> event_;
};

}  // namespace expertflow
