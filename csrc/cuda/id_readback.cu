#include <cuda_runtime.h>

#include <bit>

#include "cuda/cuda_error.h"
#include "cuda/id_readback.h"
#include "cuda/mapped_word.h"

namespace expertflow {
namespace {

constexpr size_t kMinCapacity = 4096;
constexpr int kMaxThreads = 1024;

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
  AwaitWord(*word, num_reads_, stream, "expert ids");
  return {host_ids, count};
}

}  // namespace expertflow
