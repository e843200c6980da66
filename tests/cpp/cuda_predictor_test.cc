// The predictor on the device against the one on the host, from the same router inputs.

#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/predictor/predictor.h"
#include "cuda/device_predictor.h"
#include "cuda/stream.h"
#include "cuda_test.h"
#include "device_buffer.h"
#include "expert_mlp_reference.h"

namespace expertflow {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;

struct Shape {
  const char* name;
  RoutingRule rule;
  int32_t hidden;
  int32_t num_layers;
  int32_t max_distance;
  DType dtype;         // of the router inputs
  DType router_dtype;  // that the weights can be kept in
  bool has_biases = false;
  int64_t num_steps = 60;
};

std::ostream& operator<<(std::ostream& out, const Shape& shape) { return out << shape.name; }

using enum DType;
const Shape kSoftmax = {.name = "softmax",
                        .rule = {.num_experts = 32, .top_k = 4},
                        .hidden = 64,
                        .num_layers = 5,
                        .max_distance = 3,
                        .dtype = kBFloat16,
                        .router_dtype = kBFloat16,
                        .num_steps = 300};
const Shape kShapes[] = {
    kSoftmax,
    {"softmax_float_routers", {.num_experts = 16, .top_k = 2}, 72, 4, 2, kFloat32, kFloat32, true},
    {"half_inputs", {.num_experts = 40, .top_k = 6}, 136, 4, 3, kFloat16, kFloat16},
    {"odd_experts", {.num_experts = 13, .top_k = 3}, 40, 4, 2, kFloat32, kBFloat16, true},
    {"all_experts", {.num_experts = 8, .top_k = 8}, 16, 3, 2, kFloat32, kBFloat16},
    {"one_expert_of_three", {.num_experts = 3, .top_k = 1}, 8, 3, 2, kBFloat16, kFloat32},
    {"groups",
     {.num_experts = 64, .top_k = 6, .num_groups = 8, .top_groups = 3},
     64,
     4,
     3,
     kBFloat16,
     kBFloat16},
    {"sigmoid", {.num_experts = 20, .top_k = 4, .is_sigmoid = true}, 64, 4, 3, kBFloat16, kFloat32},
    {"sigmoid_groups",
     {.num_experts = 256, .top_k = 8, .is_sigmoid = true, .num_groups = 8, .top_groups = 4},
     128,
     3,
     2,
     kBFloat16,
     kBFloat16},
    {"eight_ahead", {.num_experts = 24, .top_k = 2}, 32, 10, 8, kBFloat16, kBFloat16},
    {"one_ahead", {.num_experts = 128, .top_k = 8}, 512, 3, 1, kBFloat16, kBFloat16},
    // Rows of several parts, and on an H200 two or three groups of experts a block.
    {.name = "many_blocks",
     .rule = {.num_experts = 253, .top_k = 8},
     .hidden = 1032,
     .num_layers = 5,
     .max_distance = 4,
     .dtype = kBFloat16,
     .router_dtype = kBFloat16,
     .num_steps = 15},
    {.name = "many_blocks_float_routers",
     .rule = {.num_experts = 256, .top_k = 8},
     .hidden = 776,
     .num_layers = 5,
     .max_distance = 4,
     .dtype = kFloat32,
     .router_dtype = kFloat32,
     .num_steps = 15},
};

constexpr int32_t kNumBuckets = 11;
// Not at random: where two experts tie but for rounding, host and device may learn of different
// ones.
constexpr uint32_t kSeed = 1;

size_t Index(int64_t value) { return static_cast<size_t>(value); }

// A token as the layers of a model see it: each layer adds a little to what came before.
using Pass = std::vector<std::vector<float>>;

Pass RandomPass(const Shape& shape, std::mt19937& random) {
  Pass pass;
  std::vector<float> state(Index(shape.hidden), 0.0F);
  for (int32_t layer = 0; layer < shape.num_layers; ++layer) {
    const std::vector<float> step =
        RandomValues(state.size(), layer == 0 ? 1.2 : 0.6, kFloat32, random);
    for (size_t i = 0; i < state.size(); ++i) state[i] += step[i];
    pass.push_back(ToFloats(ToBytes(state, shape.dtype), shape.dtype));
  }
  return pass;
}

Predictor MakeHost(const Shape& shape, std::mt19937& random) {
  const size_t num_values = Index(shape.num_layers) * Index(shape.rule.num_experts);
  RouterWeights routers;
  routers.weights = RandomValues(num_values * Index(shape.hidden), 1 / std::sqrt(shape.hidden),
                                 shape.router_dtype, random);
  if (shape.has_biases) routers.biases = RandomValues(num_values, 0.3, kFloat32, random);
  if (shape.rule.is_sigmoid) routers.corrections = RandomValues(num_values, 0.1, kFloat32, random);
  return Predictor({.num_layers = shape.num_layers,
                    .hidden = shape.hidden,
                    .max_distance = shape.max_distance,
                    .num_token_buckets = kNumBuckets,
                    .rule = shape.rule},
                   routers);
}

// What the last layer sees stands for the embedding, too.
const std::vector<float>& ValuesOf(const Pass& pass, int32_t layer) {
  return layer == kTokenStart ? pass.back() : pass[Index(layer)];
}

void Teach(Predictor& host, const Pass& pass, int64_t token) {
  host.BeginPass(1, 1, std::vector<int64_t>{token});
  for (int32_t layer = kTokenStart; layer < host.config().num_layers; ++layer) {
    host.Observe(layer, ValuesOf(pass, layer));
    host.Predict(layer);
    if (layer >= 0) host.Learn(layer);
  }
}

// One that has learned, and forgotten what it saw last, as that does not travel. The very first
// gradients of the gain are divided by their own size, so that rounding decides where they are 0.
Predictor MakeTaughtHost(const Shape& shape, std::mt19937& random) {
  Predictor host = MakeHost(shape, random);
  for (int64_t step = 0; step < 20; ++step) Teach(host, RandomPass(shape, random), step);
  host.BeginPass(2, 1, {});
  return host;
}

// The experts of a span by need, the lower id first among equals.
std::vector<int32_t> Ranked(std::span<const float> need) {
  std::vector<int32_t> order(need.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order,
                           [&](int32_t a, int32_t b) { return need[Index(a)] > need[Index(b)]; });
  return order;
}

std::vector<int32_t> ReadInts(const int32_t* on_device, size_t count) {
  std::vector<int32_t> values(count);
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
  EXPERTFLOW_CUDA_CHECK(
      cudaMemcpy(values.data(), on_device, count * sizeof(int32_t), cudaMemcpyDeviceToHost));
  return values;
}

// A predictor on the device with the memory for one token.
class Device {
 public:
  Device(const Shape& shape, const Predictor& host,
         const DevicePredictor::Options& options = {.list_size = 2})
      : dtype_(shape.dtype),
        num_layers_(shape.num_layers),
        row_bytes_(Index(shape.hidden) * ElementBytes(shape.dtype)),
        predictor_(host, options),
        hidden_(Index(shape.num_layers) * row_bytes_),
        token_(sizeof(int64_t)) {}

  DevicePredictor& predictor() { return predictor_; }
  const CudaStream& stream() { return stream_; }

  void SetToken(const Pass& pass, int64_t token) {
    EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
    for (size_t layer = 0; layer < pass.size(); ++layer) {
      const std::vector<std::byte> bytes = ToBytes(pass[layer], dtype_);
      EXPERTFLOW_CUDA_CHECK(cudaMemcpy(hidden_.data() + layer * row_bytes_, bytes.data(),
                                       bytes.size(), cudaMemcpyHostToDevice));
    }
    EXPERTFLOW_CUDA_CHECK(cudaMemcpy(token_.data(), &token, sizeof token, cudaMemcpyHostToDevice));
    EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
  }

  void Observe(int32_t layer, const SlotId* expert_slot = nullptr) {
    const int32_t row = layer == kTokenStart ? num_layers_ - 1 : layer;
    predictor_.Observe(layer,
                       {.hidden = hidden_.data() + Index(row) * row_bytes_,
                        .dtype = dtype_,
                        .id = reinterpret_cast<const int64_t*>(token_.data()),
                        .expert_slot = expert_slot},
                       stream_.get());
  }

  void EnqueuePass(int32_t num_layers) {
    predictor_.BeginPass(stream_.get());
    Observe(kTokenStart);
    for (int32_t layer = 0; layer < num_layers; ++layer) {
      Observe(layer);
      predictor_.Learn(layer, stream_.get());
    }
    predictor_.JoinLearning(stream_.get());
  }

 private:
  DType dtype_;
  int32_t num_layers_;
  size_t row_bytes_;
  CudaStream stream_;
  DevicePredictor predictor_;
  DeviceBuffer hidden_;
  DeviceBuffer token_;
};

void ExpectNear(const std::vector<float>& found, const std::vector<float>& expected,
                float tolerance, const char* name) {
  ASSERT_EQ(found.size(), expected.size());
  float largest = 0.0F;
  for (size_t i = 0; i < found.size(); ++i) {
    largest = std::max(largest, std::abs(found[i] - expected[i]) / (1 + std::abs(expected[i])));
    if (!std::isfinite(found[i])) largest = found[i];
  }
  EXPECT_LE(largest, tolerance) << name;
}

void ExpectSameState(const DevicePredictor& device, const Predictor& host) {
  LearnedState found(host.config());
  device.CopyTo(found);
  const LearnedState& expected = host.state();
  ExpectNear(found.weights, expected.weights, 1e-4F, "weights");
  ExpectNear(found.token_means, expected.token_means, 1e-4F, "token_means");
  ExpectNear(found.deviations, expected.deviations, 1e-5F, "deviations");
  EXPECT_EQ(found.token_counts, expected.token_counts);
  EXPECT_EQ(found.num_tokens, expected.num_tokens);
  for (size_t pair = 0; pair < expected.scalars.size(); ++pair) {
    EXPECT_NEAR(found.scalars[pair].gain, expected.scalars[pair].gain, 1e-4F);
    EXPECT_EQ(found.scalars[pair].num_tokens, expected.scalars[pair].num_tokens);
    EXPECT_NEAR(found.calibrations[pair].slope, expected.calibrations[pair].slope, 1e-3F);
    EXPECT_NEAR(found.calibrations[pair].offset, expected.calibrations[pair].offset, 1e-3F);
    EXPECT_EQ(found.calibrations[pair].num_tokens, expected.calibrations[pair].num_tokens);
  }
}

class CudaPredictorTest : public CudaTest {};

class CudaPredictorRulesTest : public CudaTest, public ::testing::WithParamInterface<Shape> {};

TEST_P(CudaPredictorRulesTest, ForeseesAndLearnsAsTheHost) {
  const Shape& shape = GetParam();
  std::mt19937 random(kSeed);
  Predictor host = MakeTaughtHost(shape, random);
  Device device(shape, host);
  EXPECT_EQ(device.predictor().router_dtype(), shape.router_dtype);
  const auto top_k = Index(shape.rule.top_k);
  size_t num_ranked = 0, num_same = 0;
  for (int64_t step = 0; step < shape.num_steps; ++step) {
    const Pass pass = RandomPass(shape, random);
    const int64_t token = step * step % 31;
    device.SetToken(pass, token);
    host.BeginPass(1, 1, std::vector<int64_t>{token});
    device.predictor().BeginPass(device.stream().get());
    for (int32_t layer = kTokenStart; layer < shape.num_layers; ++layer) {
      host.Observe(layer, ValuesOf(pass, layer));
      host.Predict(layer);
      device.Observe(layer);
      ASSERT_EQ(device.predictor().num_distances(), host.num_distances());
      for (int32_t distance = 1; distance <= host.num_distances(); ++distance) {
        const std::span<const float> need = device.predictor().need(distance);
        std::vector<int32_t> expected(top_k), found = Ranked(need);
        for (size_t e = 0; e < need.size(); ++e) {
          ASSERT_NEAR(need[e], host.need(distance)[e], 2e-4F)
              << "step " << step << ", layer " << layer << ", distance " << distance;
        }
        host.Rank(distance, expected);
        std::ranges::sort(expected);
        std::sort(found.begin(), found.begin() + shape.rule.top_k);
        num_ranked += top_k;
        for (const int32_t e : expected) {
          num_same += std::binary_search(found.begin(), found.begin() + shape.rule.top_k, e);
        }
      }
      if (layer == kTokenStart) continue;
      host.Learn(layer);
      device.predictor().Learn(layer, device.stream().get());
    }
  }
  ExpectSameState(device.predictor(), host);
  EXPECT_GE(static_cast<double>(num_same), 0.999 * static_cast<double>(num_ranked));
}

INSTANTIATE_TEST_SUITE_P(, CudaPredictorRulesTest, ::testing::ValuesIn(kShapes),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_F(CudaPredictorTest, ListsTheMostNeededExpertsThatHaveNoSlot) {
  const Shape shape = kSoftmax;
  const auto num_experts = Index(shape.rule.num_experts);
  std::mt19937 random(kSeed);
  const Predictor host = MakeHost(shape, random);
  constexpr size_t kListSize = 3;
  constexpr float kMinNeed = 0.3F;
  Device device(shape, host, {.min_need = kMinNeed, .list_size = kListSize});
  std::vector<SlotId> slots(Index(shape.num_layers) * num_experts, SlotId::kNone);
  for (SlotId& slot : slots) slot = random() % 2 == 0 ? SlotId{3} : SlotId::kNone;
  DeviceBuffer on_device(slots.size() * sizeof(SlotId));
  EXPERTFLOW_CUDA_CHECK(cudaMemcpy(on_device.data(), slots.data(), slots.size() * sizeof(SlotId),
                                   cudaMemcpyHostToDevice));
  bool is_ever_short = false, is_ever_full = false;
  for (int step = 0; step < 30; ++step) {
    device.SetToken(RandomPass(shape, random), -1);
    device.predictor().BeginPass(device.stream().get());
    device.Observe(1, reinterpret_cast<const SlotId*>(on_device.data()));
    const std::vector<int32_t> counts =
        ReadInts(device.predictor().prefetch_counts(), Index(shape.max_distance));
    const std::vector<int32_t> ids =
        ReadInts(device.predictor().prefetch_ids(), Index(shape.max_distance) * kListSize);
    for (int32_t distance = 1; distance <= device.predictor().num_distances(); ++distance) {
      const std::span<const float> need = device.predictor().need(distance);
      std::vector<int32_t> expected;
      for (const int32_t e : Ranked(need)) {
        if (need[Index(e)] < kMinNeed || expected.size() == kListSize) break;
        if (slots[Index(1 + distance) * num_experts + Index(e)] == SlotId::kNone) {
          expected.push_back(e);
        }
      }
      const auto first = ids.begin() + (distance - 1) * static_cast<std::ptrdiff_t>(kListSize);
      const auto count = counts[Index(distance) - 1];
      EXPECT_EQ(std::vector<int32_t>(first, first + count), expected);
      is_ever_short |= expected.size() < kListSize;
      is_ever_full |= expected.size() == kListSize;
    }
  }
  EXPECT_TRUE(is_ever_short);
  EXPECT_TRUE(is_ever_full);
}

TEST_F(CudaPredictorTest, EqualNeedsAreListedByTheLowerId) {
  const Shape shape = kSoftmax;
  std::mt19937 random(kSeed);
  Predictor host = MakeHost(shape, random);
  Device device(shape, host, {.min_need = 0.0F, .list_size = 4});
  device.SetToken(Pass(Index(shape.num_layers), std::vector<float>(Index(shape.hidden), 0.0F)), 1);
  device.predictor().BeginPass(device.stream().get());
  device.Observe(0);  // nothing is known of such a row
  EXPECT_THAT(ReadInts(device.predictor().prefetch_ids(), 4), ElementsAre(0, 1, 2, 3));
}

TEST_F(CudaPredictorTest, RowsThatAreNotFiniteOrZeroTeachWhatTheyTeachOnTheHost) {
  const Shape shape = {"", {.num_experts = 12, .top_k = 3}, 24, 4, 3, kFloat32, kFloat32};
  std::mt19937 random(kSeed);
  Predictor host = MakeTaughtHost(shape, random);
  Device device(shape, host);
  for (int step = 0; step < 60; ++step) {
    Pass pass = RandomPass(shape, random);
    if (step == 20) pass[2][5] = NAN;
    if (step == 25) pass[1][0] = INFINITY;
    if (step == 30) pass[0].assign(pass[0].size(), 0.0F);
    if (step == 35) pass[3][0] = 1e30F;
    device.SetToken(pass, step % 5);
    device.EnqueuePass(shape.num_layers);
    Teach(host, pass, step % 5);
  }
  ExpectSameState(device.predictor(), host);
}

LearnedState StateAfter(const Shape& shape, bool with_graph) {
  std::mt19937 random(kSeed);
  const Predictor host = MakeHost(shape, random);
  Device device(shape, host);
  cudaGraphExec_t graph = nullptr;
  if (with_graph) {
    cudaGraph_t captured;
    const cudaStream_t stream = device.stream().get();
    EXPERTFLOW_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    device.EnqueuePass(shape.num_layers);
    EXPERTFLOW_CUDA_CHECK(cudaStreamEndCapture(stream, &captured));
    EXPERTFLOW_CUDA_CHECK(cudaGraphInstantiate(&graph, captured, 0));
    EXPERTFLOW_CUDA_CHECK(cudaGraphDestroy(captured));
  }
  for (int step = 0; step < 40; ++step) {
    device.SetToken(RandomPass(shape, random), step % 7);
    if (with_graph) {
      EXPERTFLOW_CUDA_CHECK(cudaGraphLaunch(graph, device.stream().get()));
    } else {
      device.EnqueuePass(shape.num_layers);
    }
  }
  LearnedState state(host.config());
  device.predictor().CopyTo(state);
  if (with_graph) EXPERTFLOW_CUDA_CHECK(cudaGraphExecDestroy(graph));
  return state;
}

TEST_F(CudaPredictorTest, GivesTheSameBitsAgainAndFromAGraph) {
  for (const Shape& shape : {kSoftmax, kShapes[8], kShapes[9], kShapes[11]}) {
    const LearnedState first = StateAfter(shape, false);
    for (const bool with_graph : {false, true}) {
      const LearnedState again = StateAfter(shape, with_graph);
      EXPECT_EQ(again.weights, first.weights) << shape.name << with_graph;
      EXPECT_EQ(again.token_means, first.token_means) << shape.name << with_graph;
      for (size_t pair = 0; pair < first.scalars.size(); ++pair) {
        EXPECT_EQ(again.scalars[pair].gain, first.scalars[pair].gain);
        EXPECT_EQ(again.calibrations[pair].slope, first.calibrations[pair].slope);
      }
    }
    EXPECT_GT(*std::ranges::max_element(first.weights), 0.01F);
  }
}

TEST_F(CudaPredictorTest, WhatWasLearnedTravelsBothWays) {
  std::mt19937 random(kSeed);
  const Predictor host = MakeTaughtHost(kSoftmax, random);
  const Predictor other = MakeTaughtHost(kSoftmax, random);
  Device device(kSoftmax, host);
  for (const Predictor* source : {&other, &host}) {
    device.predictor().CopyFrom(source->state());
    LearnedState found(host.config());
    device.predictor().CopyTo(found);
    EXPECT_EQ(found.weights, source->state().weights);
    EXPECT_EQ(found.token_means, source->state().token_means);
    ExpectSameState(device.predictor(), *source);
  }
  EXPECT_NE(host.state().weights, other.state().weights);
}

TEST_F(CudaPredictorTest, ALayerTeachesOnlyWhatWasForeseenInThePass) {
  std::mt19937 random(kSeed);
  const Predictor host = MakeHost(kSoftmax, random);
  Device device(kSoftmax, host);
  device.SetToken(RandomPass(kSoftmax, random), 1);
  const cudaStream_t stream = device.stream().get();
  EXPECT_THROW(device.predictor().Learn(1, stream), std::logic_error);
  for (int32_t layer = 0; layer < kSoftmax.num_layers; ++layer) {
    device.predictor().BeginPass(stream);
    device.Observe(layer);
    device.predictor().Learn(layer, stream);
  }
  LearnedState state(host.config());
  device.predictor().CopyTo(state);
  EXPECT_THAT(state.weights, Each(0.0F));
  EXPECT_THAT(state.num_tokens, Each(1.0F));
}

TEST_F(CudaPredictorTest, RefusesWhatItCannotDo) {
  std::mt19937 random(1);
  const auto make = [&](const Shape& shape, const DevicePredictor::Options& options) {
    const Predictor host = MakeHost(shape, random);
    const DevicePredictor device(host, options);
  };
  Shape shape = kSoftmax;
  shape.hidden = 12;
  EXPECT_THROW(make(shape, {}), std::invalid_argument);
  shape = kSoftmax;
  shape.rule.num_experts = 257;
  EXPECT_THROW(make(shape, {}), std::invalid_argument);
  shape = kSoftmax;
  shape.max_distance = 9;
  EXPECT_THROW(make(shape, {}), std::invalid_argument);
  EXPECT_THROW(make(kSoftmax, {.list_size = 33}), std::invalid_argument);

  const Predictor host = MakeHost(kSoftmax, random);
  Device device(kSoftmax, host);
  device.SetToken(RandomPass(kSoftmax, random), 1);
  device.predictor().BeginPass(device.stream().get());
  EXPECT_THROW(device.Observe(5), std::out_of_range);
  EXPECT_THROW(device.predictor().need(1), std::out_of_range);
  device.Observe(4);
  EXPECT_THROW(device.predictor().need(1), std::out_of_range);
  const ObservedToken unaligned{.hidden = reinterpret_cast<const void*>(8), .dtype = kFloat32};
  EXPECT_THROW(device.predictor().Observe(0, unaligned, device.stream().get()),
               std::invalid_argument);
}

}  // namespace
}  // namespace expertflow
