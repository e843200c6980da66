// How fast experts come through the expert cache when every one is missing, from a RAM pool, beside
// plain memcpy of the same bytes on the same number of threads (in the cache the thread that waits
// copies too). Layers are top-8; the pool is larger than the processor's caches.

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "host/expert_cache.h"
#include "host/mapped_memory.h"
#include "host/ram_pool.h"

namespace expertflow {
namespace {

constexpr int32_t kTopK = 8;
constexpr size_t kPoolBytes = size_t{512} << 20;

ExpertLayout Layout(size_t expert_bytes) {
  return ExpertLayout({{"weights", DType::kFloat32, expert_bytes / 4}});
}

std::shared_ptr<RamPool> TouchedPool(size_t expert_bytes) {
  const auto pool = std::make_shared<RamPool>(Layout(expert_bytes), kPoolBytes / expert_bytes);
  std::memset(pool->expert_data(ExpertIndex{0}), 1, pool->num_bytes());
  return pool;
}

void CopyThroughCache(benchmark::State& state) {
  const auto expert_bytes = static_cast<size_t>(state.range(0)) << 10;
  const std::shared_ptr<RamPool> pool = TouchedPool(expert_bytes);
  const auto num_experts = static_cast<int32_t>(pool->num_experts());
  ExpertCache cache(
      pool, Layout(expert_bytes),
      {.num_layers = 1,
       .num_experts = num_experts,
       .num_slots = num_experts / 2,
       .planner = {.top_k = kTopK, .expert_bytes = expert_bytes, .policy = PolicyKind::kLru},
       .num_threads = static_cast<int32_t>(state.range(1)) - 1});
  std::vector<int64_t> ids(kTopK);
  int64_t next = 0;
  const auto run_layer = [&] {
    for (int64_t& id : ids) id = next++ % num_experts;  // a circle: LRU misses all
    cache.BeginLayer(0, ids, 1);
    for (int32_t row = 0; row < kTopK; ++row) cache.Wait(row);
  };
  for (int32_t i = 0; i < num_experts / kTopK; ++i) run_layer();  // touches all slots
  cache.ResetStatistics();
  for (auto _ : state) run_layer();
  const LayerStatistics counts = cache.statistics()[0];
  state.SetBytesProcessed(counts.demand_bytes);
  state.counters["misses_per_layer"] =
      static_cast<double>(counts.misses) / static_cast<double>(state.iterations());
}

void CopyByMemcpy(benchmark::State& state) {
  static std::shared_ptr<RamPool> pool;
  static MappedMemory slots;
  const auto expert_bytes = static_cast<size_t>(state.range(0)) << 10;
  if (state.thread_index() == 0) {
    pool = TouchedPool(expert_bytes);
    slots = MappedMemory(pool->num_experts() / 2 * expert_bytes);
    std::memset(slots.data(), 1, slots.num_bytes());
  }
  size_t next = static_cast<size_t>(state.thread_index());
  for (auto _ : state) {
    for (int32_t i = 0; i < kTopK; ++i, next += static_cast<size_t>(state.threads())) {
      const auto expert = static_cast<ExpertIndex>(next % pool->num_experts());
      const size_t slot = next % (pool->num_experts() / 2);
      std::memcpy(slots.data() + slot * expert_bytes, pool->expert_data(expert), expert_bytes);
    }
  }
  state.SetBytesProcessed(state.iterations() * kTopK * state.range(0) << 10);
}

constexpr int64_t kSmallKib = 48;
constexpr int64_t kLargeKib = 9 << 10;

BENCHMARK(CopyThroughCache)
    ->ArgNames({"expert_kib", "threads"})
    ->ArgsProduct({{kSmallKib, kLargeKib}, {2, 3}})
    ->UseRealTime()
    ->MinTime(0.2)
    ->Repetitions(7)
    ->ReportAggregatesOnly();
BENCHMARK(CopyByMemcpy)
    ->ArgName("expert_kib")
    ->Arg(kSmallKib)
    ->Arg(kLargeKib)
    ->ThreadRange(1, 2)
    ->UseRealTime()
    ->MinTime(0.2)
    ->Repetitions(7)
    ->ReportAggregatesOnly();

}  // namespace
}  // namespace expertflow
