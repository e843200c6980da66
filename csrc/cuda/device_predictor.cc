#include "cuda/device_predictor.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda/cuda_error.h"
#include "cuda/device_guard.h"

namespace expertflow {
namespace {

using predictor::kMaxDistance;
using predictor::kMaxExperts;

constexpr uint32_t kSpinsBetweenChecks = 1 << 16;

int CurrentDevice() {
  int device;
  EXPERTFLOW_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

const PredictorConfig& Checked(const PredictorConfig& config) {
  const auto refuse = [](const std::string& what) {
    throw std::invalid_argument("the predictor's kernels cannot take " + what);
  };
  if (config.hidden % 8 != 0) {
    refuse("hidden size " + std::to_string(config.hidden) + ", which is no multiple of 8");
  }
  if (config.rule.num_experts > kMaxExperts) {
    refuse(std::to_string(config.rule.num_experts) + " experts, more than " +
           std::to_string(kMaxExperts));
  }
  if (config.max_distance > kMaxDistance) {
    refuse(std::to_string(config.max_distance) + " distances, more than " +
           std::to_string(kMaxDistance));
  }
  return config;
}

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
size_t PlaceArrays(predictor::View& view, DType router_dtype, const RouterWeights& routers,
                   size_t num_pairs, size_t list_size, std::byte* data) {
  const auto layers = static_cast<size_t>(view.num_layers);
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
  arena.Take(view.facts, layers);
  arena.Take(view.directions, layers * hidden);
  arena.Take(view.rest, layers * (features - hidden));
  arena.Take(view.margins, layers * experts);
  arena.Take(view.targets, layers * experts);
  arena.Take(view.base, layers * distances * experts);
  arena.Take(view.scores, layers * distances * experts);
  arena.Take(view.schedules, layers * distances);
  arena.Take(view.previous, layers * hidden);
  arena.Take(view.partial, (distances + 1) * static_cast<size_t>(view.max_parts) * experts);
  arena.Take(view.tickets, distances + 1);
  arena.Take(view.need, distances * experts);
  arena.Take(view.prefetch_ids, distances * list_size);
  arena.Take(view.prefetch_counts, distances);
  return arena.num_bytes();
}

// Calls visit(array on the device, vector on the host) for all that is learned.
template <class State, class Visit>
void ForEachLearned(const predictor::View& view, State& state, Visit visit) {
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

DevicePredictor::DevicePredictor(const Predictor& host, const Options& options)
    : config_(Checked(host.config())),
      options_(options),
      device_(CurrentDevice()),
      first_pair_(host.state().first_pair),
      launch_(PreparePredictor(NarrowestDType(host.routers().weights))),
      observed_pass_(static_cast<size_t>(config_.num_layers), -1) {
  if (options.list_size < 1 || options.list_size > config_.rule.num_experts) {
    throw std::invalid_argument("a list of " + std::to_string(options.list_size) + " of " +
                                std::to_string(config_.rule.num_experts) + " experts");
  }
  view_.rule = config_.rule;
  view_.num_layers = config_.num_layers;
  view_.hidden = config_.hidden;
  view_.max_distance = config_.max_distance;
  view_.num_features = static_cast<int32_t>(host.state().num_features);
  view_.num_buckets = config_.num_token_buckets;
  view_.max_parts = MaxPredictorParts(view_, launch_.router_dtype);
  const auto place = [&](std::byte* data) {
    return PlaceArrays(view_, launch_.router_dtype, host.routers(), first_pair_.back(),
                       static_cast<size_t>(options.list_size), data);
  };
  memory_ = DeviceMemory(place(nullptr), "the predictor");
  place(memory_.data());
  EXPERTFLOW_CUDA_CHECK(cudaMemset(memory_.data(), 0, memory_.num_bytes()));
  CopyRouters(host.routers());
  CopyFrom(host.state());
  if (options.publishes_need) {
    const size_t num_needs = static_cast<size_t>(config_.max_distance) * host.state().num_experts;
    host_.emplace(kMaxDistance * sizeof(uint64_t) + num_needs * sizeof(float));
    std::fill_n(host_words(), kMaxDistance, 0);
  }
}

DevicePredictor::~DevicePredictor() = default;  // freeing its memory waits for what uses it

void DevicePredictor::CopyRouters(const RouterWeights& routers) {
  const std::vector<std::byte> weights = Convert(routers.weights, launch_.router_dtype);
  CopyBytes(const_cast<void*>(view_.routers), weights.data(), weights.size());
  const auto copy = [](const float* to, const std::vector<float>& from) {
    if (to != nullptr) CopyBytes(const_cast<float*>(to), from.data(), from.size() * sizeof(float));
  };
  copy(view_.biases, routers.biases);
  copy(view_.corrections, routers.corrections);
}

void DevicePredictor::CopyFrom(const LearnedState& state) {
  const DeviceGuard guard(device_);
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
  ForEachLearned(view_, state, [](auto* on_device, const auto& on_host) {
    CopyBytes(on_device, on_host.data(), on_host.size() * sizeof *on_device);
  });
  // What was seen last is no past of what comes next.
  EXPERTFLOW_CUDA_CHECK(cudaMemset(view_.previous, 0,
                                   sizeof(float) * static_cast<size_t>(config_.num_layers) *
                                       static_cast<size_t>(config_.hidden)));
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
  std::ranges::fill(observed_pass_, -1);
}

void DevicePredictor::CopyTo(LearnedState& state) const {
  const DeviceGuard guard(device_);
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
  ForEachLearned(view_, state, [](const auto* on_device, auto& on_host) {
    CopyBytes(on_host.data(), on_device, on_host.size() * sizeof *on_device);
  });
}

void DevicePredictor::BeginPass(cudaStream_t stream) {
  JoinLearning(stream);
  ++pass_;
}

void DevicePredictor::JoinLearning(cudaStream_t stream) {
  if (!is_learning_) return;
  const DeviceGuard guard(device_);
  learned_.MakeWait(stream);
  is_learning_ = false;
}

void DevicePredictor::CheckLayer(int32_t layer) const {
  if (layer >= 0 && layer < config_.num_layers) return;
  throw std::out_of_range("layer " + std::to_string(layer) + " is not one of the predictor's " +
                          std::to_string(config_.num_layers));
}

void DevicePredictor::Observe(int32_t layer, const ObservedToken& token, cudaStream_t stream) {
  CheckLayer(layer);
  if (token.hidden == nullptr || reinterpret_cast<uintptr_t>(token.hidden) % 16 != 0) {
    throw std::invalid_argument("a router input must be device memory aligned to 16 bytes");
  }
  const DeviceGuard guard(device_);
  const auto index = static_cast<size_t>(layer);
  num_distances_ = std::min(config_.max_distance, config_.num_layers - 1 - layer);
  LaunchPredict({.view = view_,
                 .split = {},
                 .layer = layer,
                 .num_distances = num_distances_,
                 .first_pair = static_cast<int32_t>(first_pair_[index]),
                 .hidden = token.hidden,
                 .hidden_dtype = token.dtype,
                 .token = token.id,
                 .expert_slot = token.expert_slot,
                 .min_need = options_.min_need,
                 .list_size = options_.list_size,
                 .host_need = host_ ? host_need() : nullptr,
                 .host_words = host_ ? host_words() : nullptr,
                 .sequence = ++num_observed_},
                launch_, stream);
  observed_pass_[index] = pass_;
  last_stream_ = stream;
}

void DevicePredictor::Learn(int32_t layer, cudaStream_t stream) {
  CheckLayer(layer);
  const auto index = static_cast<size_t>(layer);
  if (observed_pass_[index] != pass_) {
    throw std::logic_error("layer " + std::to_string(layer) + " was not observed in this pass");
  }
  predictor::LearnParams params{
      .view = view_, .split = {}, .layer = layer, .num_pairs = 0, .distances = {}, .pairs = {}};
  for (int32_t distance = 1; distance <= std::min(config_.max_distance, layer); ++distance) {
    const size_t from = index - static_cast<size_t>(distance);
    if (observed_pass_[from] != pass_) continue;
    params.distances[params.num_pairs] = distance;
    params.pairs[params.num_pairs++] = static_cast<int32_t>(first_pair_[from]) + distance - 1;
  }
  const DeviceGuard guard(device_);
  observed_.Record(stream);
  observed_.MakeWait(learning_stream_.get());
  LaunchLearn(params, launch_, learning_stream_.get());
  learned_.Record(learning_stream_.get());
  is_learning_ = true;
}

std::span<const float> DevicePredictor::need(int32_t distance) const {
  if (distance < 1 || distance > num_distances_) {
    throw std::out_of_range("distance " + std::to_string(distance) + " of " +
                            std::to_string(num_distances_) + " that were foreseen");
  }
  if (!host_) throw std::logic_error("this predictor leaves its needs on the device");
  const size_t row = static_cast<size_t>(distance) - 1;
  const auto num_experts = static_cast<size_t>(config_.rule.num_experts);
  const std::atomic_ref<uint64_t> word(host_words()[row]);
  const auto is_there = [&] { return word.load(std::memory_order_acquire) == num_observed_; };
  for (uint32_t spins = 1; !is_there(); ++spins) {
    if (spins % kSpinsBetweenChecks != 0) continue;
    const cudaError_t code = cudaStreamQuery(last_stream_);  // a kernel that failed writes nothing
    if (code == cudaErrorNotReady) {
      cudaGetLastError();
      continue;
    }
    CheckCuda(code, "cudaStreamQuery", __FILE__, __LINE__, "while waiting for predicted needs");
    if (!is_there()) throw std::logic_error("the needs were captured in a graph, not computed");
  }
  return {host_need() + row * num_experts, num_experts};
}

}  // namespace expertflow
