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
constexpr size_t kExpertBytes = 90;

struct Fixture {
  Fixture(int32_t num_slots, const PlannerConfig& config)
      : table(kLayers, kExperts, num_slots),
        planner(table, config),
        queue(num_slots, /*chunk_bytes=*/10, /*max_chunks_in_flight=*/2),
        prefetcher(table.view(), planner, queue, config, Prefetcher::kUntried) {}

  // Plans the next layer, of which a transfer takes 90 % of the time. Returns the horizon.
  int32_t RunLayer(const std::vector<int64_t>& routed, double bytes_per_second = 1e6) {
    const Plan& plan = *planner.PlanLayer(NextLayer(), routed, 1, now + 1);
    ++now;
    for (const PlanRow& row : plan.rows) planner.Publish(row.slot);
    prefetcher.RecordPlan(plan);
    return prefetcher.BeginLayer({.compute_us = 100.0, .bytes_per_second = bytes_per_second});
  }

  int32_t NextLayer() const { return static_cast<int32_t>((now + 1) % kLayers); }

  int32_t Prefetch(std::vector<Prediction> predictions) {
    return prefetcher.Prefetch(predictions, [this](SlotId slot, Tick needed_at) {
      queue.Post(slot, table.view().slot_expert[Index(slot)], kExpertBytes,
                 TransferClass::kPrefetch, needed_at);
    });
  }

  SlotId SlotOf(ExpertId expert) const {
    return table.view().expert_slot[Index(ToIndex(table.view(), expert))];
  }
  bool IsResident(ExpertId expert) const { return SlotOf(expert) != SlotId::kNone; }

  SlotTable table;
  Planner planner;
  TransferQueue queue;
  Prefetcher prefetcher;
  Tick now = 0;
};

// A link that is busy with others: nothing of what is prefetched begins. What waits may be taken
// back, so it is no reason to look farther ahead, where still more would wait.
TEST(PrefetcherTest, HorizonDoesNotGrowWithWhatWaits) {
  Fixture f(kLayers * kExperts,
            {.top_k = 1, .expert_bytes = kExpertBytes, .policy = PolicyKind::kLru});
  int num_posted = 0;
  for (int i = 1; i <= 2000; ++i) {
    const int32_t horizon = f.RunLayer({0});
    ASSERT_EQ(horizon, 1) << "at tick " << i;
    std::vector<Prediction> predictions;
    for (int32_t d = 1; d <= horizon; ++d) {
      predictions.push_back({d, static_cast<int32_t>(1 + (f.now + d) % (kExperts - 1)), 1.0F});
    }
    num_posted += f.Prefetch(predictions);
    ASSERT_EQ(f.queue.queued_bytes(), kExpertBytes);
  }
  EXPECT_EQ(num_posted, 2000);
}

// Its layer has passed without it. A chunk that is out cannot be taken back, so then it goes on,
// but behind what is needed now.
TEST(PrefetcherTest, WhatHasBegunForNothingIsInNobodysWay) {
  for (const bool has_chunk_out : {false, true}) {
    SCOPED_TRACE(has_chunk_out);
    Fixture f(kLayers * kExperts,
              {.top_k = 1, .expert_bytes = kExpertBytes, .policy = PolicyKind::kLru});
    f.RunLayer({0});
    const int32_t next_layer = f.NextLayer();
    ASSERT_EQ(f.Prefetch({{1, 5, 0.5F}}), 1);
    const Chunk chunk = *f.queue.Next();
    f.planner.Submit(chunk.slot);
    if (!has_chunk_out) f.queue.Finish(chunk, true);
    f.RunLayer({0});
    EXPECT_EQ(f.Prefetch({{1, 6, 0.9F}}), 1);
    EXPECT_EQ(f.IsResident({next_layer, 5}), has_chunk_out);
    EXPECT_EQ(f.queue.Next()->expert, ToIndex(f.table.view(), {f.NextLayer(), 6}));
    if (!has_chunk_out) {
      EXPECT_EQ(f.planner.statistics(next_layer).wasted_prefetch_bytes, chunk.num_bytes);
    }
  }
}

// A transfer takes 150 % of a layer's time, so a whole one would be worth a need of 0.27 one layer
// ahead, and what is left of it one of 0.2.
TEST(PrefetcherTest, WhatHasBegunGetsItsPlaceBackIfTheRestIsWorthIt) {
  constexpr double kBytesPerSecond = 0.6e6;
  Fixture f(kLayers * kExperts,
            {.top_k = 1, .expert_bytes = kExpertBytes, .policy = PolicyKind::kLru});
  ASSERT_EQ(f.RunLayer({0}, kBytesPerSecond), 2);
  ASSERT_EQ(f.Prefetch({{2, 5, 0.9F}}), 1);
  for (int i = 0; i < 5; ++i) f.queue.Finish(*f.queue.Next(), true);
  ASSERT_GE(f.RunLayer({0}, kBytesPerSecond), 1);
  const SlotId slot = f.SlotOf({f.NextLayer(), 5});
  ASSERT_TRUE(f.queue.IsQueuedPrefetch(slot));
  f.Prefetch({});
  EXPECT_GT(f.queue.needed_at(slot), f.now + Prefetcher::kMaxHorizon);
  f.Prefetch({{1, 5, 0.23F}});
  EXPECT_EQ(f.queue.needed_at(slot), f.now + 1);
}

// Two slots a layer, and both hold what is expected, by a threshold of a fifth.
TEST(PrefetcherTest, TakesTheSlotOfWhatIsExpectedLeast) {
  for (const float need : {0.6F, 0.4F}) {
    SCOPED_TRACE(need);
    Fixture f(2 * kLayers, {.top_k = 2,
                            .expert_bytes = kExpertBytes,
                            .policy = PolicyKind::kLru,
                            .scope = CacheScope::kLayer});
    for (int i = 0; i < kLayers; ++i) ASSERT_GE(f.RunLayer({0, 1}), 1);
    const bool is_worth_a_transfer = need > 0.5F;  // beside 0.3
    const int32_t next = f.NextLayer();
    EXPECT_EQ(f.Prefetch({{1, 0, 0.3F}, {1, 1, 0.9F}, {1, 2, need}}), is_worth_a_transfer);
    EXPECT_TRUE(f.IsResident({next, 1}));
    EXPECT_EQ(f.IsResident({next, 0}), !is_worth_a_transfer);
    EXPECT_EQ(f.IsResident({next, 2}), is_worth_a_transfer);
  }
}

}  // namespace
}  // namespace expertflow
