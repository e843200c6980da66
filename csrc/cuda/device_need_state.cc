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
  const std::vector<NeedAhead> ahead(static_cast<size_t>(num_experts));
  const std::vector<NeedObserved> observed(static_cast<size_t>(num_experts));
  const NeedOutcome outcome;
  view_.model = arrays.state();
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
  const size_t ahead_bytes = ahead.size() * sizeof(NeedAhead);
  const size_t observed_bytes = observed.size() * sizeof(NeedObserved);
  NeedArrays::ForEach(view_.model, [&](auto*& array, size_t bytes) { reserve(array, bytes); });
  for (const size_t bytes :
       {latest_bytes, count_bytes, ahead_bytes, observed_bytes, sizeof outcome}) {
    reserve(nullptr, bytes);
  }
  memory_ = DeviceMemory(num_bytes, "the eviction policy's model");
  next = memory_.data();
  NeedArrays::ForEach(view_.model, [&](auto*& array, size_t bytes) { place(array, array, bytes); });
  place(view_.latest, zeros.data(), latest_bytes);
  place(view_.latest_count, zeros.data(), count_bytes);
  place(view_.ahead, ahead.data(), ahead_bytes);
  place(view_.observed, observed.data(), observed_bytes);
  place(view_.outcome, &outcome, sizeof outcome);
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
}

}  // namespace expertflow
