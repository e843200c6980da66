// Experts through the transfer queue and the copy engine, beside raw cudaMemcpyAsync.

#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <numeric>
#include <span>
#include <thread>
#include <vector>

#include "core/cache_control.h"
#include "cuda/cuda_error.h"
#include "cuda/device_memory.h"
#include "cuda/event.h"
#include "cuda/expert_cache.h"
#include "cuda/pinned_pool.h"
#include "cuda/stream.h"
#include "host/ram_pool.h"

namespace expertflow {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kExpertBytes = 9 * kMiB;
constexpr int32_t kExperts = 256;
constexpr int32_t kBatch = 64;          // experts in a full queue
constexpr int32_t kNumBatches = 4;      // in turn
constexpr int32_t kSlots = 2 * kBatch;  // so that none is found when its turn comes
static_assert(kNumBatches * kBatch <= kExperts);
constexpr size_t kChunkBytes = 5 * kMiB;  // as expertflow/cache.py has it

double NowUs() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

ExpertLayout Layout() { return ExpertLayout({{"w", DType::kBFloat16, kExpertBytes / 2}}); }

// Touched and pinned, made once.
const std::shared_ptr<PinnedPool>& Pool() {
  static const std::shared_ptr<PinnedPool> pool = [] {
    auto ram = std::make_shared<RamPool>(Layout(), size_t{kExperts});
    for (int32_t e = 0; e < kExperts; ++e) {
      std::memset(ram->expert_data(ExpertIndex{e}), e, kExpertBytes);
    }
    auto pinned = std::make_shared<PinnedPool>(ram, 0, true);
    pinned->Pin(0, kExperts);
    return pinned;
  }();
  return pool;
}

ExpertCacheOptions Options(size_t chunk_bytes, int32_t num_slots = kSlots) {
  return {
      .num_layers = 1,
      .num_experts = kExperts,
      .num_slots = num_slots,
      .planner = {.top_k = 8, .expert_bytes = kExpertBytes, .policy = PolicyKind::kLru},
      .chunk_bytes = chunk_bytes,
      .num_threads = 4,
  };
}

struct Ids {
  explicit Ids(const std::vector<int64_t>& ids) : memory(ids.size() * 8, "ids"), count(ids.size()) {
    EXPERTFLOW_CUDA_CHECK(
        cudaMemcpy(memory.data(), ids.data(), memory.num_bytes(), cudaMemcpyHostToDevice));
  }
  const int64_t* get() const { return reinterpret_cast<const int64_t*>(memory.data()); }
  DeviceMemory memory;
  size_t count;
};

// Bytes per second of `count` copies of `num_bytes`, all enqueued at once on one stream.
double RawBandwidth(size_t num_bytes, size_t count) {
  static const DeviceMemory to(kBatch * kExpertBytes, "raw copies");
  const CudaStream stream;
  CudaEvent begin(CudaEvent::Timing::kOn);
  CudaEvent end(CudaEvent::Timing::kOn);
  begin.Record(stream.get());
  for (size_t i = 0; i < count; ++i) {
    const size_t offset = i * num_bytes % (kBatch * kExpertBytes - num_bytes + 1) / 256 * 256;
    const std::byte* from = Pool()->expert_data(ExpertIndex{0}) + offset;
    EXPERTFLOW_CUDA_CHECK(
        cudaMemcpyAsync(to.data() + offset, from, num_bytes, cudaMemcpyHostToDevice, stream.get()));
  }
  end.Record(stream.get());
  end.Synchronize();
  return static_cast<double>(count * num_bytes) / end.ElapsedUs(begin) * 1e6;
}

void BM_RawCopies(benchmark::State& state) {
  const auto num_bytes = static_cast<size_t>(state.range(0)) * 1024;
  const size_t count = std::min(kBatch * kExpertBytes / num_bytes, size_t{2000});
  double bytes_per_second = 0.0;
  for (auto _ : state) {
    bytes_per_second = RawBandwidth(num_bytes, count);
    state.SetIterationTime(static_cast<double>(count * num_bytes) / bytes_per_second);
  }
  state.counters["GB/s"] = bytes_per_second / 1e9;
}
BENCHMARK(BM_RawCopies)
    ->ArgName("KiB")
    ->Arg(64)
    ->Arg(1024)
    ->Arg(4096)
    ->Arg(9216)
    ->UseManualTime()
    ->Iterations(5)
    ->Unit(benchmark::kMillisecond);

// Four batches of experts in turn, of which the cache holds two: none is found when its turn comes.
class Batches {
 public:
  explicit Batches(size_t chunk_bytes)
      : cache_(Pool(), Layout(), Options(chunk_bytes), 0), ids_(EveryId()), device_ids_(ids_) {}

  // A plan that demands the next batch, and the last byte of it.
  void Demand() {
    turn_ = (turn_ + 1) % kNumBatches;
    Use();
    stream_.Synchronize();
  }

  // The same batch by prefetches, and then its use. Returns the microseconds of the former; 0 if
  // not all of them were posted.
  double Prefetch() {
    turn_ = (turn_ + 1) % kNumBatches;
    cache_.ResetStatistics();
    const double begin_us = NowUs();
    const std::span<const int64_t> batch = std::span(ids_).subspan(turn_ * kBatch, kBatch);
    if (cache_.Prefetch(0, batch, 1) != kBatch) return 0.0;
    while (cache_.statistics()[0].prefetch_bytes < int64_t{kBatch} * int64_t{kExpertBytes}) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    const double us = NowUs() - begin_us;
    Use();
    return us;
  }

 private:
  static std::vector<int64_t> EveryId() {
    std::vector<int64_t> ids(kExperts);
    std::iota(ids.begin(), ids.end(), 0);
    return ids;
  }

  void Use() {  // as one token, so that all slots may be taken
    const Plan& plan =
        cache_.BeginLayer(0, device_ids_.get() + turn_ * kBatch, kBatch, 1, stream_.get());
    for (int32_t r = 0; r < std::ssize(plan.rows); ++r) cache_.Wait(r, stream_.get());
  }

  cuda::ExpertCache cache_;
  CudaStream stream_;
  std::vector<int64_t> ids_;
  Ids device_ids_;
  size_t turn_ = 0;
};

// Reports how much of the bandwidth of raw copies of the same experts is reached.
template <class Move>
void FullQueue(benchmark::State& state, Move move) {
  std::vector<double> shares;
  double bytes_per_second = 0.0;
  for (auto _ : state) {
    const double us = move();
    if (us == 0.0) return state.SkipWithError("not every prefetch was posted");
    state.SetIterationTime(us / 1e6);
    bytes_per_second = kBatch * kExpertBytes / us * 1e6;
    shares.push_back(bytes_per_second / RawBandwidth(kExpertBytes, kBatch));
  }
  std::ranges::sort(shares);
  state.counters["GB/s"] = bytes_per_second / 1e9;
  state.counters["share_of_raw_median"] = shares[shares.size() / 2];
  state.counters["share_of_raw_min"] = shares.front();
}

void BM_FullQueueOfDemands(benchmark::State& state) {
  Batches batches(kChunkBytes);
  FullQueue(state, [&] {
    const double begin_us = NowUs();
    batches.Demand();
    return NowUs() - begin_us;
  });
}
BENCHMARK(BM_FullQueueOfDemands)->UseManualTime()->Iterations(15)->Unit(benchmark::kMillisecond);

void BM_FullQueueOfPrefetches(benchmark::State& state) {
  Batches batches(static_cast<size_t>(state.range(0)) * 1024);
  batches.Demand();
  FullQueue(state, [&] { return batches.Prefetch(); });
}
BENCHMARK(BM_FullQueueOfPrefetches)
    ->ArgName("chunk_KiB")
    ->Arg(1024)
    ->Arg(3072)
    ->Arg(5120)
    ->Arg(9216)
    ->UseManualTime()
    ->Iterations(11)
    ->Unit(benchmark::kMillisecond);

// One demanded expert behind a queue full of prefetches: how long it takes longer than alone, in
// chunks.
void BM_Preemption(benchmark::State& state) {
  cuda::ExpertCache cache(Pool(), Layout(), Options(kChunkBytes, 96), 0);
  const CudaStream stream;
  std::vector<double> waits_us;
  std::vector<int64_t> every_id(kExperts);
  std::iota(every_id.begin(), every_id.end(), 0);
  const Ids ids(every_id);
  int64_t expert = 0;
  const auto demand_us = [&](int64_t id) {
    const double begin_us = NowUs();
    cache.BeginLayer(0, ids.get() + id, 1, 1, stream.get());
    cache.Wait(0, stream.get());
    stream.Synchronize();
    return NowUs() - begin_us;
  };
  std::vector<double> alone_us;
  for (int i = 0; i < 20; ++i) alone_us.push_back(demand_us(expert++));
  std::ranges::sort(alone_us);
  for (auto _ : state) {
    std::vector<int64_t> prefetched;
    for (int i = 0; i < 24; ++i) prefetched.push_back((expert + 1 + i) % kExperts);
    cache.Prefetch(0, prefetched, 2);
    const double us = demand_us((expert + 60) % kExperts);
    state.SetIterationTime(us / 1e6);
    waits_us.push_back(us - alone_us[alone_us.size() / 2]);
    for (const int64_t id : prefetched) demand_us(id);  // the queue is empty again
    expert = (expert + 61) % kExperts;
  }
  std::ranges::sort(waits_us);
  const double chunk_us = kChunkBytes / RawBandwidth(kExpertBytes, kBatch) * 1e6;
  state.counters["alone_us"] = alone_us[alone_us.size() / 2];
  state.counters["chunk_us"] = chunk_us;
  state.counters["waited_chunks_median"] = waits_us[waits_us.size() / 2] / chunk_us;
  state.counters["waited_chunks_max"] = waits_us.back() / chunk_us;
}
BENCHMARK(BM_Preemption)->UseManualTime()->Iterations(50)->Unit(benchmark::kMicrosecond);

// Host time to take a chunk from the queue, submit its copy, and note its end.
void BM_SubmitChunk(benchmark::State& state) {
  CacheControl control(Options(kChunkBytes), 2);
  const DeviceMemory slots(kSlots * kExpertBytes, "slots");
  const CudaStream stream;
  CudaEvent copied;
  std::vector<int64_t> ids(kBatch);
  std::vector<double> submit_us;
  for (auto _ : state) {
    state.PauseTiming();
    std::iota(ids.begin(), ids.end(),
              static_cast<int64_t>(state.iterations() % kNumBatches) * kBatch);
    control.BeginLayer(0, ids, 1, NowUs());
    state.ResumeTiming();
    while (control.HasChunk()) {
      const double begin_us = NowUs();
      const Chunk chunk = *control.NextChunk();
      EXPERTFLOW_CUDA_CHECK(cudaMemcpyAsync(
          slots.data() + static_cast<size_t>(Index(chunk.slot)) * kExpertBytes + chunk.offset_bytes,
          Pool()->expert_data(chunk.expert) + chunk.offset_bytes, chunk.num_bytes,
          cudaMemcpyHostToDevice, stream.get()));
      copied.Record(stream.get());
      const double submitted_us = NowUs();
      copied.Synchronize();
      const double finish_us = NowUs();
      control.FinishChunk(chunk, std::nullopt);
      submit_us.push_back(submitted_us - begin_us + NowUs() - finish_us);
    }
  }
  std::ranges::sort(submit_us);
  state.counters["host_us_median"] = submit_us[submit_us.size() / 2];
  state.counters["host_us_p90"] = submit_us[submit_us.size() * 9 / 10];
}
BENCHMARK(BM_SubmitChunk)->Iterations(8)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace expertflow
