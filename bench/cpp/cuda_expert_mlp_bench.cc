// The expert MLP (gate-up and down) of one layer, bf16, in the shapes of five models, for 1, 4 and
// 16 tokens, beside a kernel that only reads memory and the device's own copy. A graph of many
// layers walks through 4 GiB of slots, so that no expert is in the L2 cache when its turn comes;
// the time of a layer is the graph's time over its layers, launch gaps included. Tokens choose
// experts at random; bytes count each chosen expert once.

#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/expert_layout.h"
#include "cuda/cuda_error.h"
#include "cuda/devices.h"
#include "cuda/expert_mlp.h"
#include "cuda/stream.h"
#include "cuda/weighted_sum.h"
#include "cuda_measure.h"
#include "cuda_memory_kernels.h"
#include "cuda_timing.h"

namespace expertflow {
namespace {

constexpr size_t kArenaBytes = size_t{4} << 30;
constexpr size_t kSmallBytes = size_t{32} << 20;  // hidden states, partial outputs, workspace
constexpr int kIterations = 30;

struct Model {
  const char* name;
  ExpertMlpKind kind;
  int32_t hidden;
  int32_t intermediate;
  int32_t num_experts;
  int32_t top_k;
};
constexpr Model kModels[] = {
    {"Qwen3-30B-A3B", ExpertMlpKind::kStandard, 2048, 768, 128, 8},
    {"DeepSeek-V2-Lite", ExpertMlpKind::kStandard, 2048, 1408, 64, 6},
    {"OLMoE", ExpertMlpKind::kStandard, 2048, 1024, 64, 8},
    {"Mixtral-8x7B", ExpertMlpKind::kStandard, 4096, 14336, 8, 2},
    {"gpt-oss-20b", ExpertMlpKind::kGptOss, 2880, 2880, 32, 4},
};

// Device memory that all benchmarks share, filled with random bf16 values. Freed with the process.
struct Memory {
  static const Memory& Get() {
    static const Memory memory;
    return memory;
  }
  std::byte* arena;
  std::byte* hidden;
  std::byte* partial;
  std::byte* workspace;

 private:
  Memory() {
    for (std::byte** data : {&arena, &hidden, &partial, &workspace}) {
      const size_t num_bytes = data == &arena ? kArenaBytes : kSmallBytes;
      void* allocated;
      EXPERTFLOW_CUDA_CHECK(cudaMalloc(&allocated, num_bytes));
      LaunchFillRandom(allocated, num_bytes, data == &arena ? 0.04F : 1.0F, nullptr);
      *data = static_cast<std::byte*>(allocated);
    }
    EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
  }
};

double read_rate = 0;  // bytes per second, set by ReadOnly, which runs first

void ReadOnly(benchmark::State& state) {
  const CudaStream stream;
  read_rate = Measure(state, stream.get(), 1, double{kArenaBytes}, [&] {
    LaunchReadAll(Memory::Get().arena, kArenaBytes,
                  reinterpret_cast<unsigned*>(Memory::Get().workspace), stream.get());
  });
}

void CopyDeviceToDevice(benchmark::State& state) {
  const CudaStream stream;
  std::byte* arena = Memory::Get().arena;
  // Counts bytes read plus bytes written. Copies what is random onto what is random.
  Measure(state, stream.get(), 1, double{kArenaBytes}, [&] {
    EXPERTFLOW_CUDA_CHECK(cudaMemcpyAsync(arena + kArenaBytes / 2, arena, kArenaBytes / 2,
                                          cudaMemcpyDeviceToDevice, stream.get()));
  });
}

ExpertMlpShape ShapeOf(const Model& model) {
  const auto hidden = static_cast<size_t>(model.hidden);
  const auto intermediate = static_cast<size_t>(model.intermediate);
  std::vector<SegmentSpec> specs = {{"gate_up_proj", DType::kBFloat16, 2 * intermediate * hidden},
                                    {"down_proj", DType::kBFloat16, hidden * intermediate}};
  if (model.kind == ExpertMlpKind::kGptOss) {
    specs.push_back({"gate_up_proj_bias", DType::kBFloat16, 2 * intermediate});
    specs.push_back({"down_proj_bias", DType::kBFloat16, hidden});
  }
  const ExpertLayout layout(specs);
  const std::vector<Segment>& segments = layout.segments();
  return {model.kind,
          DType::kBFloat16,
          model.hidden,
          model.intermediate,
          layout.slot_bytes(),
          segments[0].offset_bytes,
          segments[1].offset_bytes,
          segments[segments.size() > 2 ? 2 : 0].offset_bytes,
          segments[segments.size() > 2 ? 3 : 0].offset_bytes};
}

// Layers with experts at random, in consecutive slots, until the arena has been walked through.
class Walk {
 public:
  Walk(const Model& model, int32_t num_tokens) : model_(model), num_tokens_(num_tokens) {
    const auto num_slots = static_cast<int32_t>(kArenaBytes / shape_.slot_stride_bytes);
    std::mt19937 random(1);
    while (true) {
      std::map<int32_t, std::vector<int32_t>> places = Route(random);
      if (num_experts_ + static_cast<int32_t>(places.size()) > num_slots) break;
      std::vector<PairGroup> groups;
      for (auto& [expert, expert_places] : places) {
        places_.push_back(std::make_unique<std::vector<int32_t>>(std::move(expert_places)));
        groups.push_back({num_experts_++, *places_.back()});
      }
      layers_.push_back(groups);
    }
  }

  double num_layers() const { return static_cast<double>(layers_.size()); }
  double bytes_per_layer() const {
    return static_cast<double>(num_experts_) * static_cast<double>(shape_.slot_stride_bytes) /
           num_layers();
  }

  void Enqueue(cudaStream_t stream) const {
    const Memory& memory = Memory::Get();
    for (const std::vector<PairGroup>& groups : layers_) {
      mlp_.Launch({.slots = memory.arena,
                   .hidden = memory.hidden,
                   .num_tokens = num_tokens_,
                   .top_k = model_.top_k,
                   .groups = groups,
                   .partial = memory.partial,
                   .workspace = memory.workspace},
                  stream);
    }
  }

 private:
  std::map<int32_t, std::vector<int32_t>> Route(std::mt19937& random) const {
    std::map<int32_t, std::vector<int32_t>> places;
    std::vector<int32_t> experts(static_cast<size_t>(model_.num_experts));
    std::iota(experts.begin(), experts.end(), 0);
    for (int32_t place = 0; place < num_tokens_ * model_.top_k; ++place) {
      if (place % model_.top_k == 0) std::shuffle(experts.begin(), experts.end(), random);
      places[experts[static_cast<size_t>(place % model_.top_k)]].push_back(place);
    }
    return places;
  }

  const Model& model_;
  int32_t num_tokens_;
  ExpertMlpShape shape_ = ShapeOf(model_);
  ExpertMlp mlp_{shape_};
  int32_t num_experts_ = 0;  // over all layers: also the slots used
  std::vector<std::unique_ptr<std::vector<int32_t>>> places_;
  std::vector<std::vector<PairGroup>> layers_;
};

void ExpertMlpLayer(benchmark::State& state) {
  const Model& model = kModels[state.range(0)];
  const CudaStream stream;
  const Walk walk(model, static_cast<int32_t>(state.range(1)));
  const Graph graph(stream.get(), [&] { walk.Enqueue(stream.get()); });
  const double rate = Measure(state, stream.get(), walk.num_layers(), walk.bytes_per_layer(),
                              [&] { graph.Launch(stream.get()); });
  if (read_rate > 0) state.counters["%_of_read"] = 100 * rate / read_rate;
  state.SetLabel(std::string(model.name) + " bf16, tokens " + std::to_string(state.range(1)));
}

void WeightedSumOfTokens(benchmark::State& state) {
  constexpr int kLaunches = 100;
  const Memory& memory = Memory::Get();
  const CudaStream stream;
  const WeightedSum sum = {.partial = memory.partial,
                           .weights = memory.workspace,
                           .output = memory.hidden,
                           .num_tokens = static_cast<int32_t>(state.range(0)),
                           .top_k = 8,
                           .hidden = 2048,
                           .dtype = DType::kBFloat16,
                           .weights_dtype = DType::kBFloat16};
  const Graph graph(stream.get(), [&] {
    for (int i = 0; i < kLaunches; ++i) LaunchWeightedSum(sum, stream.get());
  });
  Measure(state, stream.get(), kLaunches, static_cast<double>(state.range(0)) * 9 * 2048 * 2,
          [&] { graph.Launch(stream.get()); });
}

// Names the device that the figures are from; without one there is nothing to measure.
const bool registered = [] {
  if (const GpuList list = ListGpus(); list.gpus.empty()) {
    std::fprintf(stderr, "no GPU: %s\n", list.missing_reason.c_str());
    return false;
  }
  cudaDeviceProp properties;
  EXPERTFLOW_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  const auto l2_bytes = static_cast<size_t>(properties.l2CacheSize);
  benchmark::AddCustomContext("device", properties.name);
  benchmark::AddCustomContext("slots / L2 cache", std::to_string(kArenaBytes / l2_bytes));
  benchmark::RegisterBenchmark("ReadOnly", ReadOnly)->UseManualTime()->Iterations(kIterations);
  benchmark::RegisterBenchmark("CopyDeviceToDevice", CopyDeviceToDevice)
      ->UseManualTime()
      ->Iterations(kIterations);
  benchmark::RegisterBenchmark("ExpertMlpLayer", ExpertMlpLayer)
      ->ArgNames({"model", "tokens"})
      ->ArgsProduct({benchmark::CreateDenseRange(0, 4, 1), {1, 4, 16}})
      ->UseManualTime()
      ->Iterations(kIterations);
  benchmark::RegisterBenchmark("WeightedSumOfTokens", WeightedSumOfTokens)
      ->ArgName("tokens")
      ->Arg(1)
      ->Arg(16)
      ->UseManualTime()
      ->Iterations(kIterations);
  return true;
}();

}  // namespace
}  // namespace expertflow
