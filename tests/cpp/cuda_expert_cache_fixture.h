// A small expert cache on a GPU, over a scripted source.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cuda/cuda_error.h"
#include "cuda/expert_cache.h"
#include "cuda/pinned_pool.h"
#include "cuda/stream.h"
#include "cuda_test.h"
#include "host/ram_pool.h"
#include "scripted_source.h"
#include "watchdog.h"

namespace expertflow::cuda {

constexpr int32_t kLayers = 3;
constexpr int32_t kExperts = 16;
constexpr int32_t kTopK = 4;
constexpr size_t kChunk = 4096;
constexpr size_t kExpertBytes = 10 * kChunk + 256;

enum class Pool { kPinned, kUnpinned, kFile };

inline ExpertLayout Layout() { return ExpertLayout({{"w", DType::kFloat32, kExpertBytes / 4}}); }

inline ExpertCacheOptions Options(int32_t num_slots, PolicyKind policy = PolicyKind::kLru,
                                  int32_t num_threads = 3) {
  return {.num_layers = kLayers,
          .num_experts = kExperts,
          .num_slots = num_slots,
          .planner = {.top_k = kTopK, .expert_bytes = kExpertBytes, .policy = policy},
          .chunk_bytes = kChunk,
          .num_threads = num_threads};
}

// A device array of expert ids.
class DeviceIds {
 public:
  explicit DeviceIds(const std::vector<int64_t>& ids)
      : memory_(ids.size() * sizeof(int64_t), "ids") {
    EXPERTFLOW_CUDA_CHECK(
        cudaMemcpy(memory_.data(), ids.data(), memory_.num_bytes(), cudaMemcpyHostToDevice));
  }
  const int64_t* get() const { return reinterpret_cast<const int64_t*>(memory_.data()); }

 private:
  DeviceMemory memory_;
};

class CudaExpertCacheTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (!IsSkipped()) stream_.emplace();
  }

  std::shared_ptr<ExpertSource> MakeSource(Pool pool) {
    if (pool == Pool::kFile) return source_;
    auto ram = std::make_shared<RamPool>(Layout(), size_t{kLayers * kExperts});
    auto pinned = std::make_shared<PinnedPool>(ram, 0, true);
    PoolFill fill(ram, source_, 4, [&](size_t first, size_t last) {
      if (pool == Pool::kPinned) pinned->Pin(first, last);
    });
    fill.Join();
    EXPECT_EQ(pinned->is_pinned(), pool == Pool::kPinned);
    return pinned;
  }

  void MakeCache(Pool pool, const ExpertCacheOptions& options) {
    cache_ = std::make_unique<ExpertCache>(MakeSource(pool), Layout(), options, 0);
  }

  const Plan& Begin(int32_t layer, const std::vector<int64_t>& ids, int32_t num_tokens = 1) {
    const DeviceIds device_ids(ids);
    return cache_->BeginLayer(layer, device_ids.get(), ids.size(), num_tokens, stream_->get());
  }

  // Reads every row's slot in the order of the stream, as a kernel would, and checks its bytes.
  void Compute(const Plan& plan) {
    const auto num_rows = static_cast<int32_t>(plan.rows.size());
    std::vector<std::vector<std::byte>> seen(plan.rows.size());
    for (int32_t r = 0; r < num_rows; ++r) {
      auto& bytes = seen[static_cast<size_t>(r)];
      bytes.resize(kExpertBytes);
      cache_->Wait(r, stream_->get());
      EXPERTFLOW_CUDA_CHECK(
          cudaMemcpyAsync(bytes.data(), cache_->slot_data(plan.rows[static_cast<size_t>(r)].slot),
                          kExpertBytes, cudaMemcpyDeviceToHost, stream_->get()));
      cache_->Release(r, stream_->get());
    }
    stream_->Synchronize();
    for (int32_t r = 0; r < num_rows; ++r) {
      const int32_t expert = plan.layer * kExperts + plan.rows[static_cast<size_t>(r)].expert;
      EXPECT_TRUE(source_->Holds(seen[static_cast<size_t>(r)].data(), ExpertIndex{expert}))
          << "row " << r << " of layer " << plan.layer;
    }
  }

  LayerStatistics Total() const {
    LayerStatistics total;
    for (const LayerStatistics& layer : cache_->statistics()) total += layer;
    return total;
  }

  Watchdog watchdog_{"the CUDA expert cache", std::chrono::seconds(120)};
  std::shared_ptr<ScriptedSource> source_ =
      std::make_shared<ScriptedSource>(size_t{kLayers * kExperts}, kExpertBytes);
  std::unique_ptr<ExpertCache> cache_;
  std::optional<CudaStream> stream_;
};

}  // namespace expertflow::cuda
