#include "cuda/device_predictor.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/cuda_error.h"
#include "cuda/device_guard.h"
#include "cuda/mapped_word.h"

namespace expertflow {
namespace {

using predictor::kMaxDistance;
using predictor::kMaxExperts;

int CurrentDevice() {
  int device;
  EXPERTFLOW_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

const PredictorConfig& Checked(const PredictorConfig& config,
                               const DevicePredictor::Options& options) {
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
  if (options.list_size < 1 || options.list_size > config.rule.num_experts) {
    refuse("a list of " + std::to_string(options.list_size) + " of " +
           std::to_string(config.rule.num_experts) + " experts");
  }
  return config;
}

}  // namespace

DevicePredictor::DevicePredictor(const Predictor& host, const Options& options)
    : config_(Checked(host.config(), options)),
      options_(options),
      device_(CurrentDevice()),
      first_pair_(host.state().first_pair),
      state_(host, options.list_size),
      launch_(PreparePredictor(state_.router_dtype())),
      observed_pass_(SourceOf(config_.num_layers), -1) {
  if (!options.publishes_need) return;
  const size_t num_needs = static_cast<size_t>(config_.max_distance) * host.state().num_experts;
  host_.emplace(kMaxDistance * sizeof(uint64_t) + num_needs * sizeof(float));
  std::fill_n(host_words(), kMaxDistance, 0);
}

DevicePredictor::~DevicePredictor() = default;  // freeing its memory waits for what uses it

void DevicePredictor::CopyFrom(const LearnedState& state) {
  const DeviceGuard guard(device_);
  state_.CopyFrom(state);
  std::ranges::fill(observed_pass_, -1);
}

void DevicePredictor::CopyTo(LearnedState& state) const {
  const DeviceGuard guard(device_);
  state_.CopyTo(state);
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
  is_next_after_learning_ = true;
}

void DevicePredictor::CheckLayer(int32_t layer, int32_t first) const {
  if (layer >= first && layer < config_.num_layers) return;
  throw std::out_of_range("layer " + std::to_string(layer) + " is not one of the predictor's " +
                          std::to_string(config_.num_layers));
}

void DevicePredictor::Observe(int32_t layer, const ObservedToken& token, cudaStream_t stream) {
  CheckLayer(layer, kTokenStart);
  if (token.hidden == nullptr || reinterpret_cast<uintptr_t>(token.hidden) % 16 != 0) {
    throw std::invalid_argument("a router input must be device memory aligned to 16 bytes");
  }
  const DeviceGuard guard(device_);
  Follow(stream);
  const size_t source = SourceOf(layer);
  num_distances_ = std::min(config_.max_distance, config_.num_layers - 1 - layer);
  LaunchPredict({.view = state_.view(),
                 .split = {},
                 .layer = layer,
                 .num_distances = num_distances_,
                 .first_pair = static_cast<int32_t>(first_pair_[source]),
                 .hidden = token.hidden,
                 .hidden_dtype = token.dtype,
                 .token = token.id,
                 .expert_slot = token.expert_slot,
                 .min_need = options_.min_need,
                 .list_size = options_.list_size,
                 .host_need = host_ ? host_need() : nullptr,
                 .host_words = host_ ? host_words() : nullptr,
                 .sequence = ++num_observed_},
                launch_, !is_next_after_learning_, stream);
  is_next_after_learning_ = false;
  observed_pass_[source] = pass_;
}

// Predictions share their scratch memory, so those on `stream` come after those on another.
void DevicePredictor::Follow(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  EXPERTFLOW_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  is_captured_ = status != cudaStreamCaptureStatusNone;
  if (!is_captured_ && last_stream_ && *last_stream_ != stream) {
    followed_.Record(*last_stream_);
    followed_.MakeWait(stream);
  }
  last_stream_ = is_captured_ ? std::nullopt : std::optional(stream);
}

void DevicePredictor::Learn(int32_t layer, cudaStream_t stream) {
  CheckLayer(layer, 0);
  const size_t source = SourceOf(layer);
  if (observed_pass_[source] != pass_) {
    throw std::logic_error("layer " + std::to_string(layer) + " was not observed in this pass");
  }
  predictor::LearnParams params{.view = state_.view(),
                                .split = {},
                                .layer = layer,
                                .num_pairs = 0,
                                .distances = {},
                                .pairs = {}};
  for (int32_t distance = 1; distance <= std::min(config_.max_distance, layer + 1); ++distance) {
    const size_t from = source - static_cast<size_t>(distance);
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
  if (is_captured_) throw std::logic_error("the needs were captured in a graph, not computed");
  const DeviceGuard guard(device_);
  const size_t row = static_cast<size_t>(distance) - 1;
  const auto num_experts = static_cast<size_t>(config_.rule.num_experts);
  AwaitWord(host_words()[row], num_observed_, *last_stream_, "predicted needs");
  return {host_need() + row * num_experts, num_experts};
}

}  // namespace expertflow
