// The predictor on the GPU: one token, launch by launch, in a graph; the time of a launch is the
// graph's over its launches, launch gaps included. "Predict" and "Learn" walk through the layers of
// a model whose weights are many times the L2 cache (but docs-moe's), as in decoding, "..InCache"
// repeats one layer, "PredictToHost" also writes the needs to the host, and "Pass" has both for
// each layer, learning on its own stream. Predictions that follow each other overlap: one reads
// weights while the one before it sums up. "MakeTokenAndPredict" has another kernel before each,
// which lets none start early: what it takes longer than "MakeToken", that kernel alone, is a
// prediction that nothing overlaps. Bytes are the weights and routers
// read, and for Learn also the weights written.
//
// Beside them: the rate of a kernel that only reads memory, at 4 GiB a launch (the rate that % is
// of) and at the bytes of a prediction a launch; and what enqueueing costs the host.

#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/predictor/predictor.h"
#include "cuda/cuda_error.h"
#include "cuda/device_memory.h"
#include "cuda/device_predictor.h"
#include "cuda/devices.h"
#include "cuda/stream.h"
#include "cuda_measure.h"
#include "cuda_memory_kernels.h"
#include "cuda_timing.h"

namespace expertflow {
namespace {

constexpr size_t kArenaBytes = size_t{4} << 30;
constexpr int kIterations = 50;

struct Shape {
  const char* name;
  int32_t num_layers;
  int32_t hidden;
  int32_t num_experts;
  int32_t top_k;
  int32_t max_distance;
};
constexpr Shape kShapes[] = {
    {"Qwen3-30B-A3B", 48, 2048, 128, 8, 4},   {"Qwen3-30B-A3B", 48, 2048, 128, 8, 8},
    {"DeepSeek-V2-Lite", 26, 2048, 64, 6, 4}, {"gpt-oss-20b", 24, 2880, 32, 4, 4},
    {"docs-moe-12x32", 12, 256, 32, 4, 8},    {"DeepSeek-V3, 12 layers", 12, 7168, 256, 8, 4},
};

double read_rate = 0;  // bytes per second, set by ReadOnly, which runs first

// Measure, and the share of what ReadOnly reads.
template <class Enqueue>
void MeasureShare(benchmark::State& state, cudaStream_t stream, double parts, double bytes,
                  const Enqueue& enqueue) {
  const double rate = Measure(state, stream, parts, bytes, enqueue);
  if (read_rate == 0) read_rate = rate;
  state.counters["%_of_read"] = 100 * rate / read_rate;
}

const DeviceMemory& Arena() {
  static const DeviceMemory* arena = new DeviceMemory(kArenaBytes, "the benchmark");
  return *arena;
}

void ReadOnly(benchmark::State& state) {
  const CudaStream stream;
  const DeviceMemory sink(256, "the benchmark");
  const auto bytes = static_cast<size_t>(state.range(0));
  const size_t num_parts = kArenaBytes / bytes;
  const std::byte* data = Arena().data();
  const auto read = [&](size_t part) {
    LaunchReadAll(data + part * bytes, bytes, reinterpret_cast<unsigned*>(sink.data()),
                  stream.get());
  };
  read(0);  // what a first use sets up cannot be captured
  stream.Synchronize();
  const Graph graph(stream.get(), [&] {
    for (size_t part = 0; part < num_parts; ++part) read(part);
  });
  MeasureShare(state, stream.get(), static_cast<double>(num_parts), static_cast<double>(bytes),
               [&] { graph.Launch(stream.get()); });
}

// Random routers that bf16 can hold, as those of a bf16 model.
RouterWeights MakeRouters(const Shape& shape, bool in_16_bits) {
  std::mt19937 random(1);
  RouterWeights routers;
  routers.weights.resize(static_cast<size_t>(shape.num_layers) *
                         static_cast<size_t>(shape.num_experts) *
                         static_cast<size_t>(shape.hidden));
  for (float& weight : routers.weights) {
    const auto bits = static_cast<float>(static_cast<int32_t>(random() >> 25) - 64);
    weight = in_16_bits ? bits / 1024 : (bits + 1.0e-5F) / 1024;
  }
  return routers;
}

// A predictor, and one token that all layers see.
class Model {
 public:
  explicit Model(const benchmark::State& state, bool publishes_need = false)
      : shape_(kShapes[state.range(0)]), router_bytes_(state.range(1) == 16 ? 2 : 4) {
    const Predictor host({.num_layers = shape_.num_layers,
                          .hidden = shape_.hidden,
                          .max_distance = shape_.max_distance,
                          .num_token_buckets = 64,
                          .rule = {.num_experts = shape_.num_experts, .top_k = shape_.top_k}},
                         MakeRouters(shape_, state.range(1) == 16));
    num_features_ = host.state().num_features;
    predictor_ = std::make_unique<DevicePredictor>(
        host,
        DevicePredictor::Options{.list_size = shape_.top_k, .publishes_need = publishes_need});
    hidden_ = DeviceMemory(static_cast<size_t>(shape_.hidden) * 2, "the benchmark");
    MakeToken(nullptr);
    token_ = DeviceMemory(sizeof(int64_t), "the benchmark");
    EXPERTFLOW_CUDA_CHECK(cudaMemset(token_.data(), 0, token_.num_bytes()));
    EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
  }

  const Shape& shape() const { return shape_; }
  DevicePredictor& predictor() { return *predictor_; }

  void MakeToken(cudaStream_t stream) {
    LaunchFillRandom(hidden_.data(), hidden_.num_bytes(), 1.0F, stream);
  }

  void Observe(int32_t layer, cudaStream_t stream) {
    predictor_->Observe(layer,
                        {.hidden = hidden_.data(),
                         .dtype = DType::kBFloat16,
                         .id = reinterpret_cast<const int64_t*>(token_.data())},
                        stream);
  }

  // Of a layer that has all its distances.
  double weight_bytes() const {
    return 4.0 * shape_.max_distance * shape_.num_experts * static_cast<double>(num_features_);
  }
  double predict_bytes() const {
    return weight_bytes() + (1.0 + shape_.max_distance) * shape_.num_experts *
                                static_cast<double>(shape_.hidden) * router_bytes_;
  }
  std::string name() const {
    return std::string(shape_.name) + ", " + std::to_string(shape_.max_distance) +
           " ahead, routers of " + std::to_string(8 * router_bytes_) + " bits";
  }

 private:
  const Shape& shape_;
  int router_bytes_;
  size_t num_features_;
  std::unique_ptr<DevicePredictor> predictor_;
  DeviceMemory hidden_, token_;
};

using EnqueueLayer = std::function<void(int32_t layer, cudaStream_t stream)>;

// `layers` of a pass in a graph; all layers were observed in the pass it belongs to.
void MeasureLayers(benchmark::State& state, Model& model, const std::vector<int32_t>& layers,
                   double bytes, const EnqueueLayer& enqueue) {
  const CudaStream stream;
  DevicePredictor& predictor = model.predictor();
  predictor.BeginPass(stream.get());
  for (int32_t layer = 0; layer < model.shape().num_layers; ++layer) {
    model.Observe(layer, stream.get());
    predictor.Learn(layer, stream.get());
  }
  predictor.JoinLearning(stream.get());
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());  // and set up what cannot be captured
  const Graph graph(stream.get(), [&] {
    for (const int32_t layer : layers) enqueue(layer, stream.get());
    predictor.JoinLearning(stream.get());
  });
  MeasureShare(state, stream.get(), static_cast<double>(layers.size()), bytes,
               [&] { graph.Launch(stream.get()); });
  state.SetLabel(model.name());
}

std::vector<int32_t> Layers(int32_t first, int32_t last) {
  std::vector<int32_t> layers;
  for (int32_t layer = first; layer < last; ++layer) layers.push_back(layer);
  return layers;
}

void MeasurePredict(benchmark::State& state, bool publishes_need) {
  Model model(state, publishes_need);
  const Shape& shape = model.shape();
  MeasureLayers(state, model, Layers(0, shape.num_layers - shape.max_distance),
                model.predict_bytes(),
                [&](int32_t layer, cudaStream_t stream) { model.Observe(layer, stream); });
}

void Predict(benchmark::State& state) { MeasurePredict(state, false); }

void PredictToHost(benchmark::State& state) { MeasurePredict(state, true); }

void MakeToken(benchmark::State& state) {
  Model model(state);
  MeasureLayers(state, model, Layers(0, 40), 0,
                [&](int32_t, cudaStream_t stream) { model.MakeToken(stream); });
}

void MakeTokenAndPredict(benchmark::State& state) {
  Model model(state);
  const Shape& shape = model.shape();
  MeasureLayers(state, model, Layers(0, shape.num_layers - shape.max_distance),
                model.predict_bytes(), [&](int32_t layer, cudaStream_t stream) {
                  model.MakeToken(stream);
                  model.Observe(layer, stream);
                });
}

void PredictInCache(benchmark::State& state) {
  Model model(state);
  MeasureLayers(state, model, std::vector<int32_t>(40, 0), model.predict_bytes(),
                [&](int32_t layer, cudaStream_t stream) { model.Observe(layer, stream); });
}

void Learn(benchmark::State& state) {
  Model model(state);
  const Shape& shape = model.shape();
  MeasureLayers(
      state, model, Layers(shape.max_distance, shape.num_layers), 2 * model.weight_bytes(),
      [&](int32_t layer, cudaStream_t stream) { model.predictor().Learn(layer, stream); });
}

void LearnInCache(benchmark::State& state) {
  Model model(state);
  MeasureLayers(
      state, model, std::vector<int32_t>(40, model.shape().max_distance), 2 * model.weight_bytes(),
      [&](int32_t layer, cudaStream_t stream) { model.predictor().Learn(layer, stream); });
}

void Pass(benchmark::State& state) {
  Model model(state);
  const Shape& shape = model.shape();
  const int32_t end = shape.num_layers - shape.max_distance;
  if (end <= shape.max_distance)
    return state.SkipWithError("no layer both predicts and learns all");
  MeasureLayers(state, model, Layers(shape.max_distance, end),
                model.predict_bytes() + 2 * model.weight_bytes(),
                [&](int32_t layer, cudaStream_t stream) {
                  model.Observe(layer, stream);
                  model.predictor().Learn(layer, stream);
                });
}

// Host time of an Observe and a Learn that are not captured.
void EnqueueOnHost(benchmark::State& state) {
  using Clock = std::chrono::steady_clock;
  Model model(state, true);
  const CudaStream stream;
  std::vector<double> observe_us, learn_us;
  const auto us_since = [](Clock::time_point begin) {
    return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
  };
  for (auto _ : state) {
    model.predictor().BeginPass(stream.get());
    const auto begin = Clock::now();
    model.Observe(0, stream.get());
    observe_us.push_back(us_since(begin));
    const auto middle = Clock::now();
    model.predictor().Learn(0, stream.get());
    learn_us.push_back(us_since(middle));
    EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
  }
  state.counters["observe_us"] = Quantile(observe_us, 0.5);
  state.counters["learn_us"] = Quantile(learn_us, 0.5);
}

// Names the device that the figures are from; without one there is nothing to measure.
const bool registered = [] {
  if (const GpuList list = ListGpus(); list.gpus.empty()) {
    std::fprintf(stderr, "no GPU: %s\n", list.missing_reason.c_str());
    return false;
  }
  cudaDeviceProp properties;
  EXPERTFLOW_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  benchmark::AddCustomContext("device", properties.name);
  benchmark::AddCustomContext("L2 cache MB", std::to_string(properties.l2CacheSize >> 20));
  benchmark::RegisterBenchmark("ReadOnly", ReadOnly)
      ->Arg(kArenaBytes)
      ->Arg(11'304'960)  // a prediction of the first shape
      ->UseManualTime()
      ->Iterations(kIterations);
  const auto add = [](const char* name, void (*run)(benchmark::State&)) {
    benchmark::RegisterBenchmark(name, run)
        ->ArgNames({"model", "router_bits"})
        ->ArgsProduct({benchmark::CreateDenseRange(0, std::size(kShapes) - 1, 1), {16}})
        ->Args({0, 32})
        ->UseManualTime()
        ->Iterations(kIterations);
  };
  add("Predict", Predict);
  add("PredictToHost", PredictToHost);
  add("MakeToken", MakeToken);
  add("MakeTokenAndPredict", MakeTokenAndPredict);
  add("PredictInCache", PredictInCache);
  add("Learn", Learn);
  add("LearnInCache", LearnInCache);
  add("Pass", Pass);
  benchmark::RegisterBenchmark("EnqueueOnHost", EnqueueOnHost)->Args({0, 16})->Iterations(500);
  return true;
}();

}  // namespace
}  // namespace expertflow
