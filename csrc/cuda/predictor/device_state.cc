#include "cuda/predictor/device_state.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <span>
#include <string>
#include <vector>

#include "cuda/cuda_error.h"
#include "cuda/predictor_kernel.h"

namespace expertflow::predictor {
namespace {

std::vector<std::byte> Convert(std::span<const float> values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * ElementBytes(dtype));
  ConvertElements(reinterpret_cast<const std::byte*>(values.data()), DType::kFloat32, bytes.data(),
                  dtype, values.size());
  return bytes;
}

bool IsExact(std::span<const float> values, DType dtype) {
  std::vector<float> back(values.size());
  ConvertElements(Convert(values, dtype).data(), dtype, reinterpret_cast<std::byte*>(back.data()),
                  DType::kFloat32, values.size());
  return std::ranges::equal(values, back);
}

// A model in 16 bits has routers in 16 bits, whatever they were converted to.
DType NarrowestDType(std::span<const float> values) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    if (IsExact(values, dtype)) return dtype;
  }
  return DType::kFloat32;
}

// Hands out arrays one after the other; from nullptr it only counts.
class Arena {
 public:
  explicit Arena(std::byte* data) : data_(data) {}

  template <class T>
  void Take(T*& array, size_t count) {
    array = data_ == nullptr ? nullptr : reinterpret_cast<T*>(data_ + num_bytes_);
    num_bytes_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  }
  size_t num_bytes() const { return num_bytes_; }

 private:
  static constexpr size_t kAlignment = 256;
  std::byte* data_;
  size_t num_bytes_ = 0;
};

// The arrays of `view`, whose sizes are set. Returns their bytes.
size_t PlaceArrays(View& view, DType router_dtype, const RouterWeights& routers, size_t num_pairs,
                   size_t list_size, std::byte* data) {
  const auto layers = static_cast<size_t>(view.num_layers);
  const size_t sources = SourceOf(view.num_layers);
  const auto experts = static_cast<size_t>(view.rule.num_experts);
  const auto hidden = static_cast<size_t>(view.hidden);
  const auto features = static_cast<size_t>(view.num_features);
  const auto distances = static_cast<size_t>(view.max_distance);
  const auto buckets = static_cast<size_t>(view.num_buckets);
  Arena arena(data);
  std::byte* router_bytes;
  float *biases, *corrections;
  arena.Take(router_bytes, layers * experts * hidden * ElementBytes(router_dtype));
  arena.Take(biases, routers.biases.size());
  arena.Take(corrections, routers.corrections.size());
  view.routers = router_bytes;
  view.biases = routers.biases.empty() ? nullptr : biases;
  view.corrections = routers.corrections.empty() ? nullptr : corrections;
  arena.Take(view.weights, num_pairs * experts * features);
  arena.Take(view.scalars, num_pairs);
  arena.Take(view.calibrations, num_pairs);
  arena.Take(view.token_means, layers * buckets * experts);
  arena.Take(view.token_counts, layers * buckets);
  arena.Take(view.deviations, layers);
  arena.Take(view.num_tokens, layers);
  arena.Take(view.facts, sources);
  arena.Take(view.directions, sources * hidden);
  arena.Take(view.rest, layers * (features - hidden));
  arena.Take(view.margins, layers * experts);
  arena.Take(view.targets, layers * experts);
  arena.Take(view.base, sources * distances * experts);
  arena.Take(view.scores, sources * distances * experts);
  arena.Take(view.schedules, sources * distances);
  arena.Take(view.previous, layers * hidden);
  arena.Take(view.partial, (distances + 1) * static_cast<size_t>(view.max_parts) * experts);
  arena.Take(view.powers, (distances + 1) * static_cast<size_t>(view.max_parts));
  arena.Take(view.tickets, distances + 1);
  arena.Take(view.need, distances * experts);
  arena.Take(view.prefetch_ids, distances * list_size);
  arena.Take(view.prefetch_counts, distances);
  return arena.num_bytes();
}

// Calls visit(array on the device, vector on the host) for all that is learned.
template <class State, class Visit>
void ForEachLearned(const View& view, State& state, Visit visit) {
  visit(view.weights, state.weights);
  visit(view.scalars, state.scalars);
  visit(view.calibrations, state.calibrations);
  visit(view.token_means, state.token_means);
  visit(view.token_counts, state.token_counts);
  visit(view.deviations, state.deviations);
  visit(view.num_tokens, state.num_tokens);
}

void CopyBytes(void* to, const void* from, size_t num_bytes) {
  EXPERTFLOW_CUDA_CHECK(cudaMemcpy(to, from, num_bytes, cudaMemcpyDefault),
                        std::to_string(num_bytes) + " bytes");
}

}  // namespace

DeviceState::DeviceState(const Predictor& host, int32_t list_size)
    : router_dtype_(NarrowestDType(host.routers().weights)) {
  const PredictorConfig& config = host.config();
  view_.rule = config.rule;
  view_.num_layers = config.num_layers;
  view_.hidden = config.hidden;
  view_.max_distance = config.max_distance;
  view_.num_features = static_cast<int32_t>(host.state().num_features);
  view_.num_buckets = config.num_token_buckets;
  view_.max_parts = MaxPredictorParts(view_, router_dtype_);
  const auto place = [&](std::byte* data) {
    return PlaceArrays(view_, router_dtype_, host.routers(), host.state().first_pair.back(),
                       static_cast<size_t>(list_size), data);
  };
  memory_ = DeviceMemory(place(nullptr), "the predictor");
  place(memory_.data());
  EXPERTFLOW_CUDA_CHECK(cudaMemset(memory_.data(), 0, memory_.num_bytes()));
  CopyRouters(host.routers());
  CopyFrom(host.state());
}

void DeviceState::CopyRouters(const RouterWeights& routers) {
  const std::vector<std::byte> weights = Convert(routers.weights, router_dtype_);
  CopyBytes(const_cast<void*>(view_.routers), weights.data(), weights.size());
  const auto copy = [](const float* to, const std::vector<float>& from) {
    if (to != nullptr) CopyBytes(const_cast<float*>(to), from.data(), from.size() * sizeof(float));
  };
  copy(view_.biases, routers.biases);
  copy(view_.corrections, routers.corrections);
}

void DeviceState::CopyFrom(const LearnedState& state) {
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
  ForEachLearned(view_, state, [](auto* on_device, const auto& on_host) {
    CopyBytes(on_device, on_host.data(), on_host.size() * sizeof *on_device);
  });
  // What was seen last is no past of what comes next.
  EXPERTFLOW_CUDA_CHECK(cudaMemset(
      view_.previous, 0,
      sizeof(float) * static_cast<size_t>(view_.num_layers) * static_cast<size_t>(view_.hidden)));
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
}

void DeviceState::CopyTo(LearnedState& state) const {
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
  ForEachLearned(view_, state, [](const auto* on_device, auto& on_host) {
    CopyBytes(on_host.data(), on_device, on_host.size() * sizeof *on_device);
  });
}

}  // namespace expertflow::predictor
