#include "core/prefetcher.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "core/planner.h"
#include "core/slot_table.h"
#include "core/transfer_queue.h"

namespace expertflow {
namespace {

constexpr int32_t kLayers = 4;
constexpr int32_t kExperts = 16;
constexpr int32_t kSlots = kLayers * kExperts;
constexpr size_t kExpertBytes = 90;

// A link that is busy with others: nothing of what is prefetched begins. What waits may be taken
// back, so it is no reason to look farther ahead, where still more would wait.
TEST(PrefetcherTest, HorizonDoesNotGrowWithWhatWaits) {
  const PlannerConfig config{.top_k = 1, .expert_bytes = kExpertBytes, .policy = PolicyKind::kLru};
  SlotTable table(kLayers, kExperts, kSlots);
  Planner planner(table, config);
  TransferQueue queue(kSlots, /*chunk_bytes=*/10, /*max_chunks_in_flight=*/2);
  Prefetcher prefetcher(table.view(), planner, queue, config, Prefetcher::kUntried);
  int num_posted = 0;
  for (Tick tick = 1; tick <= 2000; ++tick) {
    const std::vector<int64_t> routed = {0};
    prefetcher.RecordPlan(
        *planner.PlanLayer(static_cast<int32_t>(tick % kLayers), routed, 1, tick));
    // A transfer takes 90 us.
    const int32_t horizon = prefetcher.BeginLayer({.compute_us = 100.0, .bytes_per_second = 1e6});
    ASSERT_EQ(horizon, 1) << "at tick " << tick;
    std::vector<Prediction> predictions;
    for (int32_t d = 1; d <= horizon; ++d) {
      predictions.push_back({d, static_cast<int32_t>(1 + (tick + d) % (kExperts - 1)), 1.0F});
    }
    num_posted += prefetcher.Prefetch(predictions, [&](SlotId slot, Tick needed_at) {
      queue.Post(slot, table.view().slot_expert[Index(slot)], kExpertBytes,
                 TransferClass::kPrefetch, needed_at);
    });
    ASSERT_EQ(queue.queued_bytes(), kExpertBytes);
  }
  EXPECT_EQ(num_posted, 2000);
}

}  // namespace
}  // namespace expertflow
