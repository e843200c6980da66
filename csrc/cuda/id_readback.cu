#include <cuda_runtime.h>

#include <atomic>
#include <bit>
#include <stdexcept>

#include "cuda/cuda_error.h"
#include "cuda/id_readback.h"

namespace expertflow {
namespace {

constexpr size_t kMinCapacity = 4096;
constexpr int kMaxThreads = 1024;
constexpr uint32_t kSpinsBetweenChecks = 1 << 16;

__global__ void PublishIds(const int64_t* ids, int64_t* host_ids, size_t count,
                           volatile uint64_t* word, uint64_t value) {
  for (size_t i = threadIdx.x; i < count; i += blockDim.x) host_ids[i] = ids[i];
  __threadfence_system();  // every thread's ids are visible to the host before the word is
  __syncthreads();
  if (threadIdx.x == 0) *word = value;
}

}  // namespace

IdReadback::IdReadback() { Reserve(kMinCapacity); }

void IdReadback::Reserve(size_t count) {
  if (count <= capacity_) return;
  capacity_ = std::bit_ceil(count);
  memory_.reset();
  memory_.emplace((capacity_ + 1) * sizeof(int64_t));
  *reinterpret_cast<uint64_t*>(memory_->data()) = num_reads_;
}

std::span<const int64_t> IdReadback::Read(const int64_t* device_ids, size_t count,
                                          cudaStream_t stream) {
  Reserve(count);
  auto* word = reinterpret_cast<uint64_t*>(memory_->data());
  auto* host_ids = reinterpret_cast<int64_t*>(word + 1);
  ++num_reads_;
  const int num_threads = count >= kMaxThreads ? kMaxThreads : 128;
  PublishIds<<<1, num_threads, 0, stream>>>(device_ids, host_ids, count, word, num_reads_);
  EXPERTFLOW_CUDA_CHECK(cudaGetLastError(), std::to_string(count) + " expert ids");
  Await(stream);
  return {host_ids, count};
}

void IdReadback::Await(cudaStream_t stream) const {
  auto& word = *reinterpret_cast<uint64_t*>(memory_->data());
  const std::atomic_ref<uint64_t> published(word);
  for (uint32_t spins = 1; published.load(std::memory_order_acquire) != num_reads_; ++spins) {
    if (spins % kSpinsBetweenChecks != 0) continue;
    const cudaError_t code = cudaStreamQuery(stream);  // a kernel that failed publishes nothing
    if (code == cudaErrorNotReady) {
      cudaGetLastError();
      continue;
    }
    CheckCuda(code, "cudaStreamQuery", __FILE__, __LINE__, "while waiting for expert ids");
    if (published.load(std::memory_order_acquire) == num_reads_) return;
    throw std::logic_error("the stream ended without publishing the expert ids");
  }
}

}  // namespace expertflow
