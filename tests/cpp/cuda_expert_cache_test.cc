#include "cuda/expert_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <optional>
#include <thread>
#include <vector>

#include "cuda_expert_cache_fixture.h"

namespace expertflow::cuda {
namespace {

using testing::HasSubstr;

class EveryPool : public CudaExpertCacheTest, public testing::WithParamInterface<Pool> {};

INSTANTIATE_TEST_SUITE_P(Pools, EveryPool,
                         testing::Values(Pool::kPinned, Pool::kUnpinned, Pool::kFile));

std::vector<int64_t> RandomIds(int count) {
  std::vector<int64_t> ids(static_cast<size_t>(count));
  for (int64_t& id : ids) id = rand() % kExperts;
  return ids;
}

TEST_P(EveryPool, EveryRowIsInItsSlotWhenItsTurnComes) {
  for (const PolicyKind policy :
       {PolicyKind::kLru, PolicyKind::kDecayedFrequency, PolicyKind::kOnDemand}) {
    MakeCache(GetParam(), Options(10, policy));
    for (int step = 0; step < 60; ++step) {
      const int32_t layer = step % kLayers;
      const Plan& plan = Begin(layer, RandomIds(kTopK));
      cache_->Prefetch((layer + 1) % kLayers, RandomIds(2), 1);
      Compute(plan);
    }
  }
}

TEST_P(EveryPool, WavesOfAPromptShareTheSlots) {
  MakeCache(GetParam(), Options(kTopK));
  for (int step = 0; step < 20; ++step) {
    const Plan& plan = Begin(step % kLayers, RandomIds(100), 25);
    EXPECT_GT(plan.num_waves, 1);
    Compute(plan);
  }
}

TEST_P(EveryPool, WithASlotForEveryExpertNothingMisses) {
  MakeCache(GetParam(), Options(kLayers * kExperts));
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    const Plan& plan = Begin(layer, RandomIds(64), 16);
    for (const PlanRow& row : plan.rows) {
      EXPECT_EQ(Index(row.slot), layer * kExperts + row.expert);
    }
    Compute(plan);
  }
  EXPECT_EQ(Total().misses, 0);
  EXPECT_EQ(Total().demand_bytes + Total().prefetch_bytes, 0) << "loading is not counted";
}

TEST_P(EveryPool, DestructionFinishesWhatIsUnderWay) {
  for (int round = 0; round < 10; ++round) {
    MakeCache(GetParam(), Options(12));
    Begin(0, RandomIds(kTopK));
    cache_->Prefetch(1, {{0, 1, 2, 3, 4, 5}}, 1);
    cache_.reset();
  }
}

TEST_P(EveryPool, ASlotIsNotOverwrittenWhileWorkThatReadsItIsPending) {
  // The first chunk of a transfer is the last to be read, and the stream is always behind.
  source_->set_hook([](ExpertIndex, size_t offset_bytes) {
    if (offset_bytes == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  });
  MakeCache(GetParam(), Options(kTopK));
  std::vector<int64_t> ids(kExperts);
  std::iota(ids.begin(), ids.end(), 0);
  const Plan& plan = Begin(0, ids, 17);
  const DeviceMemory seen(kExperts * kExpertBytes, "what the rows held");
  for (int32_t r = 0; r < kExperts; ++r) {
    cache_->Wait(r, stream_->get());
    EXPERTFLOW_CUDA_CHECK(cudaLaunchHostFunc(
        stream_->get(), [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(10)); },
        nullptr));
    EXPERTFLOW_CUDA_CHECK(cudaMemcpyAsync(seen.data() + static_cast<size_t>(r) * kExpertBytes,
                                          cache_->slot_data(plan.rows[static_cast<size_t>(r)].slot),
                                          kExpertBytes, cudaMemcpyDeviceToDevice, stream_->get()));
    cache_->Release(r, stream_->get());
  }
  std::vector<std::byte> bytes(seen.num_bytes());
  stream_->Synchronize();
  EXPERTFLOW_CUDA_CHECK(
      cudaMemcpy(bytes.data(), seen.data(), bytes.size(), cudaMemcpyDeviceToHost));
  for (size_t r = 0; r < size_t{kExperts}; ++r) {
    EXPECT_TRUE(source_->Holds(&bytes[r * kExpertBytes], ExpertIndex{plan.rows[r].expert})) << r;
  }
}

TEST_F(CudaExpertCacheTest, FailedReadsAreErrorsAndNeverWrongBytes) {
  MakeCache(Pool::kFile, Options(8));
  source_->set_faults({.fail_percent = 5});
  int num_failures = 0;
  for (int step = 0; step < 300; ++step) {
    const int32_t layer = step % kLayers;
    try {
      const Plan& plan = Begin(layer, RandomIds(kTopK));
      cache_->Prefetch((layer + 1) % kLayers, RandomIds(2), 1);
      Compute(plan);
    } catch (const TransferError& error) {
      EXPECT_THAT(error.what(), HasSubstr("MoE layer " + std::to_string(layer)));
      EXPECT_THAT(error.what(), HasSubstr("scripted failure"));
      ++num_failures;
    }
  }
  EXPECT_GT(num_failures, 0);
  source_->set_faults({});
  for (int32_t layer = 0; layer < kLayers; ++layer) Compute(Begin(layer, RandomIds(kTopK)));
}

TEST_F(CudaExpertCacheTest, AFailureWhileLoadingEverythingIsThrown) {
  source_->set_faults({.fail_percent = 100});
  EXPECT_THROW(MakeCache(Pool::kFile, Options(kLayers * kExperts)), TransferError);
}

TEST_F(CudaExpertCacheTest, StallIsTheTimeThatTheStreamWaits) {
  source_->set_faults({.slow_percent = 100, .max_delay_us = 1000});
  MakeCache(Pool::kFile, Options(8, PolicyKind::kLru, 1));
  Compute(Begin(0, {0, 1, 2, 3}));
  EXPECT_GT(Total().stall_us, 0.0);
  cache_->ResetStatistics();
  Compute(Begin(0, {0, 1, 2, 3}));
  EXPECT_EQ(Total().stall_us, 0.0) << "hits do not stall";
  EXPECT_GT(cache_->bandwidth_bytes_per_second(), 0.0);
}

TEST_F(CudaExpertCacheTest, BadIdsAreRefused) {
  MakeCache(Pool::kPinned, Options(8));
  EXPECT_THROW(Begin(0, {0, 1, 2, kExperts}), std::out_of_range);
  EXPECT_THROW(Begin(kLayers, {0, 1, 2, 3}), std::out_of_range);
  Compute(Begin(0, {0, 1, 2, 3}));
  EXPECT_THROW(cache_->Wait(4, stream_->get()), std::out_of_range);
}

TEST_F(CudaExpertCacheTest, ACaptureIsRefused) {
  MakeCache(Pool::kPinned, Options(8));
  const DeviceIds ids({0, 1, 2, 3});
  EXPERTFLOW_CUDA_CHECK(cudaStreamBeginCapture(stream_->get(), cudaStreamCaptureModeThreadLocal));
  EXPECT_THROW(cache_->BeginLayer(0, ids.get(), 4, 1, stream_->get()), std::logic_error);
  cudaGraph_t graph;
  EXPERTFLOW_CUDA_CHECK(cudaStreamEndCapture(stream_->get(), &graph));
  EXPERTFLOW_CUDA_CHECK(cudaGraphDestroy(graph));
  Compute(Begin(0, {0, 1, 2, 3}));
}

TEST_F(CudaExpertCacheTest, TooLargeForTheDeviceSaysWhatIsFree) {
  const ExpertLayout layout({{"w", DType::kFloat32, size_t{1} << 28}});
  const auto source = std::make_shared<ScriptedSource>(size_t{1024}, layout.slot_bytes());
  ExpertCacheOptions options = Options(1000);
  options.num_layers = 1;
  options.num_experts = 1024;
  options.planner.expert_bytes = layout.slot_bytes();
  try {
    const ExpertCache cache(source, layout, options, 0);
    FAIL() << "there is no such GPU";
  } catch (const std::bad_alloc& error) {
    EXPECT_THAT(error.what(), HasSubstr(std::to_string(1000 * layout.slot_bytes())));
    EXPECT_THAT(error.what(), HasSubstr("are free"));
  }
}

TEST_F(CudaExpertCacheTest, TwoCachesOnTwoThreads) {
  MakeCache(Pool::kPinned, Options(9));
  const auto first = std::move(cache_);
  MakeCache(Pool::kFile, Options(9));
  const auto drive = [this](ExpertCache& cache) {
    const CudaStream stream;
    for (int step = 0; step < 200; ++step) {
      const int32_t layer = step % kLayers;
      std::vector<int64_t> ids;
      for (int32_t i = 0; i < kTopK; ++i) ids.push_back((step * 7 + i * 3) % kExperts);
      const DeviceIds device_ids(ids);
      const Plan& plan = cache.BeginLayer(layer, device_ids.get(), ids.size(), 1, stream.get());
      for (int32_t r = 0; r < std::ssize(plan.rows); ++r) {
        std::vector<std::byte> bytes(kExpertBytes);
        const PlanRow row = plan.rows[static_cast<size_t>(r)];
        cache.Wait(r, stream.get());
        EXPERTFLOW_CUDA_CHECK(cudaMemcpyAsync(bytes.data(), cache.slot_data(row.slot), kExpertBytes,
                                              cudaMemcpyDeviceToHost, stream.get()));
        stream.Synchronize();
        ASSERT_TRUE(source_->Holds(bytes.data(), ExpertIndex{layer * kExperts + row.expert}));
        cache.Release(r, stream.get());
      }
    }
  };
  std::thread other([&] { drive(*first); });
  drive(*cache_);
  other.join();
}

}  // namespace
}  // namespace expertflow::cuda
