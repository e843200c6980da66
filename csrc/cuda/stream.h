#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <type_traits>

#include "cuda/cuda_error.h"

namespace expertflow {

// A stream of its own on the device that is current when it is made; the legacy default stream does
// not synchronize with it. Destruction does not wait: work already enqueued still runs, so its
// memory must outlive it.
class CudaStream {
 public:
  CudaStream() {
    cudaStream_t stream;
    EXPERTFLOW_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    stream_.reset(stream);
  }

  cudaStream_t get() const { return stream_.get(); }

  // Blocks the host until all that was enqueued is done. Throws what failed there as CudaError.
  void Synchronize() const { EXPERTFLOW_CUDA_CHECK(cudaStreamSynchronize(stream_.get())); }

 private:
  struct Destroy {
    void operator()(cudaStream_t stream) const { EXPERTFLOW_CUDA_WARN(cudaStreamDestroy(stream)); }
  };
  std::unique_ptr<std::remove_pointer_t<cudaStream_t>, Destroy> stream_;
};

}  // namespace expertflow
