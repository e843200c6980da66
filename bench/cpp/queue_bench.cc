// Host time of the transfer queue for one chunk, Next and Finish, while many transfers are queued:
// 9 MiB experts in chunks of 1 MiB. A transfer that ends is posted again, behind the others.

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "core/transfer_queue.h"

namespace expertflow {
namespace {

constexpr size_t kChunkBytes = size_t{1} << 20;
constexpr size_t kExpertBytes = 9 * kChunkBytes;
constexpr Tick kHorizon = 8;  // layers ahead that prefetches are posted

void SubmitChunk(benchmark::State& state) {
  const auto num_queued = static_cast<int32_t>(state.range(0));
  TransferQueue queue(num_queued, kChunkBytes, 2);
  Tick now = 0;
  for (int32_t s = 0; s < num_queued; ++s) {
    queue.Post(SlotId{s}, ExpertIndex{s}, kExpertBytes, TransferClass::kPrefetch,
               now + s % kHorizon);
  }
  for (auto _ : state) {
    const std::optional<Chunk> chunk = queue.Next();
    if (queue.Finish(*chunk, true) == TransferStatus::kDone) {
      ++now;
      queue.Post(chunk->slot, chunk->expert, kExpertBytes,
                 now % 4 == 0 ? TransferClass::kDemand : TransferClass::kPrefetch,
                 now + now % kHorizon);
    }
  }
}

BENCHMARK(SubmitChunk)
    ->Arg(8)
    ->Arg(64)
    ->Arg(1536)
    ->MinTime(0.1)
    ->Repetitions(9)
    ->ReportAggregatesOnly();

}  // namespace
}  // namespace expertflow
