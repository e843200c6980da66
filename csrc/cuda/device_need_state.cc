#include "cuda/device_need_state.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <vector>

#include "cuda/cuda_error.h"

namespace expertflow {
namespace {

constexpr size_t Aligned(size_t num_bytes) {
  constexpr size_t kAlignment = 256;
  return (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

DeviceNeedState::DeviceNeedState(int32_t num_layers, int32_t num_experts, int32_t top_k,
                                 int32_t num_slots) {
  const NeedArrays arrays(num_layers, num_experts, top_k, num_slots);
  const std::vector<int32_t> zeros(static_cast<size_t>(num_layers) *
                                   static_cast<size_t>(num_experts));
  const std::vector<int64_t> nothing_to_learn(static_cast<size_t>(num_layers), -1);
  const NeedRetry retried;
  const NeedAhead ahead;
  view_.model = arrays.state();
  const std::vector<int32_t> zero_sums(static_cast<size_t>(view_.model.width));
  size_t num_bytes = 0;
  std::byte* next = nullptr;
  const auto reserve = [&](const void*, size_t bytes) { num_bytes += Aligned(bytes); };
  const auto place = [&]<class T>(T*& array, const void* from, size_t bytes) {
    EXPERTFLOW_CUDA_CHECK(cudaMemcpy(next, from, bytes, cudaMemcpyDefault));
    array = reinterpret_cast<T*>(next);
    next += Aligned(bytes);
  };
  const size_t latest_bytes = zeros.size() * sizeof(int32_t);
  const size_t count_bytes = static_cast<size_t>(num_layers) * sizeof(int32_t);
  const size_t to_learn_bytes = nothing_to_learn.size() * sizeof(int64_t);
  const size_t ahead_bytes = zero_sums.size() * sizeof(int32_t);
  NeedArrays::ForEach(view_.model, [&](auto*& array, size_t bytes) { reserve(array, bytes); });
  for (const size_t bytes :
       {latest_bytes, count_bytes, to_learn_bytes, sizeof retried, sizeof ahead, ahead_bytes}) {
    reserve(nullptr, bytes);
  }
  memory_ = DeviceMemory(num_bytes, "the eviction policy's model");
  next = memory_.data();
  NeedArrays::ForEach(view_.model, [&](auto*& array, size_t bytes) { place(array, array, bytes); });
  place(view_.latest, zeros.data(), latest_bytes);
  place(view_.latest_count, zeros.data(), count_bytes);
  place(view_.to_learn, nothing_to_learn.data(), to_learn_bytes);
  place(view_.retried, &retried, sizeof retried);
  place(view_.ahead, &ahead, sizeof ahead);
  place(view_.ahead_sums, zero_sums.data(), ahead_bytes);
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
}

}  // namespace expertflow
