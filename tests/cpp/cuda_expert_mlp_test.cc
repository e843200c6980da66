#include "cuda/expert_mlp.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/cuda_error.h"
#include "cuda_test.h"
#include "expert_mlp_problem.h"
#include "expert_mlp_reference.h"

namespace expertflow {
namespace {

std::vector<std::byte> Output(const Problem& problem, const std::vector<int32_t>& slots) {
  DeviceProblem device(problem, slots);
  device.Launch(problem.Groups(slots));
  return device.partial().Read();
}

// ‖output − reference‖ / ‖reference‖; NaN if an output is.
double RelativeError(const std::vector<float>& output, const std::vector<double>& reference) {
  double error = 0;
  double norm = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    error += std::pow(double{output[i]} - reference[i], 2);
    norm += std::pow(reference[i], 2);
  }
  return std::sqrt(error / norm);
}

// Activation and output are rounded once each, to 8, 11 or 24 bits.
double ErrorBound(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return 6e-3;
    case DType::kFloat16:
      return 8e-4;
    case DType::kFloat32:
      break;
  }
  return 2e-6;
}

void ExpectMatchesReference(Problem problem) {
  const std::vector<int32_t> slots = problem.RandomSlots();
  const std::vector<float> output = ToFloats(Output(problem, slots), problem.dtype());
  EXPECT_LT(RelativeError(output, problem.Reference()), ErrorBound(problem.dtype()));
}

std::string KindName(ExpertMlpKind kind) {
  return kind == ExpertMlpKind::kStandard ? "Standard" : "GptOss";
}

class ExpertMlpTest : public CudaTest,
                      public ::testing::WithParamInterface<std::tuple<ExpertMlpKind, DType>> {
 protected:
  ExpertMlpKind kind() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
};

TEST_P(ExpertMlpTest, MatchesReference) {
  const std::pair<int32_t, int32_t> sizes[] = {{72, 40}, {8, 8}, {264, 1032}, {1024, 136}};
  for (const auto& [hidden, intermediate] : sizes) {
    for (const int32_t num_tokens : {1, 2, 3, 7, 16}) {
      SCOPED_TRACE(testing::Message() << num_tokens << " tokens, hidden size " << hidden
                                      << ", intermediate size " << intermediate);
      ExpectMatchesReference({kind(), dtype(), hidden, intermediate, num_tokens});
    }
  }
}

// The long sums of real models, one matrix at a time: whole experts would only cost the host time.
TEST_P(ExpertMlpTest, MatchesReferenceAtSizesOfModels) {
  ExpectMatchesReference({kind(), dtype(), 2880, 320, 1});
  ExpectMatchesReference({kind(), dtype(), 320, 2880, 1});
  ExpectMatchesReference({kind(), dtype(), 64, 14336, 1});
}

TEST_P(ExpertMlpTest, BitsDependNeitherOnTheSlotNorOnTheOtherRowsOfTheLaunch) {
  Problem problem(kind(), dtype(), 264, 1032, 16);
  const std::vector<int32_t> slots = problem.RandomSlots();
  const std::vector<std::byte> together = Output(problem, slots);

  const std::vector<int32_t> other_slots = problem.RandomSlots();
  DeviceProblem device(problem, other_slots);
  std::vector<Group> groups = problem.Groups(other_slots);
  std::reverse(groups.begin(), groups.end());
  for (const Group& group : groups) device.Launch({group});
  EXPECT_EQ(device.partial().Read(), together);

  device.partial().Poison();
  for (const Group& group : groups) {
    for (const int32_t place : group.places) device.Launch({{group.slot, {place}}});
  }
  EXPECT_EQ(device.partial().Read(), together);
}

TEST_P(ExpertMlpTest, BitsDoNotDependOnTheNumberOfTokens) {
  Problem problem(kind(), dtype(), 72, 40, 16);
  const std::vector<int32_t> slots = problem.RandomSlots();
  const std::vector<std::byte> all = Output(problem, slots);
  std::vector<std::byte> one_by_one;
  for (int32_t token = 0; token < 16; ++token) {
    const std::vector<std::byte> rows = Output(problem.WithTokens(token, 1), slots);
    one_by_one.insert(one_by_one.end(), rows.begin(), rows.end());
  }
  EXPECT_EQ(one_by_one, all);
}

TEST_P(ExpertMlpTest, WritesOnlyTheRowsOfItsPlaces) {
  Problem problem(kind(), dtype(), 72, 40, 3);
  const std::vector<int32_t> slots = problem.RandomSlots();
  DeviceProblem device(problem, slots);
  const Group group = problem.Groups(slots)[0];
  device.Launch({group});
  const std::vector<std::byte> bytes = device.partial().Read();
  for (int32_t place = 0; place < problem.num_places(); ++place) {
    const std::byte* row = bytes.data() + static_cast<size_t>(place) * device.row_bytes();
    const bool written = std::any_of(row, row + device.row_bytes(),
                                     [](std::byte byte) { return byte != std::byte{0xFF}; });
    const bool listed = std::ranges::find(group.places, place) != group.places.end();
    EXPECT_EQ(written, listed) << "place " << place;
  }
}

TEST_P(ExpertMlpTest, NanStaysInItsToken) {
  Problem problem(kind(), dtype(), 72, 40, 7);
  problem.tokens()[3 * 72 + 5] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> output =
      ToFloats(Output(problem, problem.RandomSlots()), problem.dtype());
  for (size_t i = 0; i < output.size(); ++i) {
    EXPECT_EQ(std::isnan(output[i]), i / (72 * kTopK) == 3) << "element " << i;
  }
}

TEST_P(ExpertMlpTest, ReplaysFromAGraph) {
  Problem problem(kind(), dtype(), 264, 136, 2);
  const std::vector<int32_t> slots = problem.RandomSlots();
  const std::vector<std::byte> expected = Output(problem, slots);
  DeviceProblem device(problem, slots);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  EXPERTFLOW_CUDA_CHECK(cudaStreamBeginCapture(device.stream(), cudaStreamCaptureModeThreadLocal));
  device.Enqueue(problem.Groups(slots));
  EXPERTFLOW_CUDA_CHECK(cudaStreamEndCapture(device.stream(), &graph));
  EXPERTFLOW_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  for (int replay = 0; replay < 3; ++replay) {
    device.partial().Poison();
    EXPERTFLOW_CUDA_CHECK(cudaGraphLaunch(executable, device.stream()));
    EXPECT_EQ(device.partial().Read(), expected);
  }
  EXPERTFLOW_CUDA_CHECK(cudaGraphExecDestroy(executable));
  EXPERTFLOW_CUDA_CHECK(cudaGraphDestroy(graph));
}

INSTANTIATE_TEST_SUITE_P(
    , ExpertMlpTest,
    ::testing::Combine(::testing::Values(ExpertMlpKind::kStandard, ExpertMlpKind::kGptOss),
                       ::testing::Values(DType::kBFloat16, DType::kFloat16, DType::kFloat32)),
    [](const auto& info) {
      return KindName(std::get<0>(info.param)) + "_" + DTypeName(std::get<1>(info.param));
    });

// The checks of the shape come first, so that these need no GPU.
constexpr ExpertMlpShape kShape = {
    ExpertMlpKind::kStandard, DType::kFloat32, 64, 32, 65536, 0, 16384};

TEST(ExpertMlpShapeTest, SizesThatAreNoMultiplesOf8AreRefused) {
  ExpertMlpShape shape = kShape;
  shape.hidden = 68;
  EXPECT_THROW(ExpertMlp{shape}, std::invalid_argument);
  shape = kShape;
  shape.intermediate = 0;
  EXPECT_THROW(ExpertMlp{shape}, std::invalid_argument);
}

TEST(ExpertMlpShapeTest, UnalignedSegmentsAreRefused) {
  ExpertMlpShape shape = kShape;
  shape.slot_stride_bytes += 8;
  EXPECT_THROW(ExpertMlp{shape}, std::invalid_argument);
  shape = kShape;
  shape.down_offset_bytes += 8;
  EXPECT_THROW(ExpertMlp{shape}, std::invalid_argument);
}

class ExpertMlpBatchTest : public CudaTest {
 protected:
  void ExpectRefused(const ExpertMlpBatch& batch) {
    EXPECT_THROW(ExpertMlp(kShape).Launch(batch, nullptr), std::invalid_argument);
  }
  // Never launched, so never read.
  void* const memory_ = reinterpret_cast<void*>(256);
  const std::vector<int32_t> places_{0, 1};
  const PairGroup group_{0, places_};
  const ExpertMlpBatch batch_{memory_, memory_, 1, 2, {&group_, 1}, memory_, memory_};
};

TEST_F(ExpertMlpBatchTest, TooManyTokensOrPlacesAreRefused) {
  ExpertMlpBatch batch = batch_;
  batch.num_tokens = 17;
  ExpectRefused(batch);
  batch = batch_;
  batch.num_tokens = 0;
  ExpectRefused(batch);
  batch = batch_;
  batch.num_tokens = 16;
  batch.top_k = 17;
  ExpectRefused(batch);
}

TEST_F(ExpertMlpBatchTest, PlacesOutsideTheOutputOrTwiceAreRefused) {
  for (const std::vector<int32_t>& places :
       {std::vector{0, 2}, std::vector{-1}, std::vector{1, 1}}) {
    const PairGroup group{0, places};
    ExpertMlpBatch batch = batch_;
    batch.groups = {&group, 1};
    ExpectRefused(batch);
  }
}

TEST_F(ExpertMlpBatchTest, UnalignedPointersAreRefused) {
  ExpertMlpBatch batch = batch_;
  batch.hidden = reinterpret_cast<void*>(264);
  ExpectRefused(batch);
  batch = batch_;
  batch.workspace = nullptr;
  ExpectRefused(batch);
}

TEST_F(ExpertMlpBatchTest, NoPlacesIsNoWork) {
  ExpertMlpBatch batch = batch_;
  batch.groups = {};
  ExpertMlp(kShape).Launch(batch, nullptr);
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
}

}  // namespace
}  // namespace expertflow
