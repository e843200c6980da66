// A prefetcher that decides at random times about random needs, beside transfers of chunk after
// chunk, some of which fail: what a slot is said to hold is what was copied into it.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "allocation_counter.h"
#include "core/planner.h"
#include "core/prefetcher.h"
#include "core/transfer_queue.h"
#include "every_policy.h"

namespace expertflow {
namespace {

constexpr int32_t kLayers = 9;
constexpr int32_t kExperts = 8;
constexpr int32_t kTopK = 2;
constexpr size_t kChunks = 4;  // of an expert, a byte each
constexpr size_t kNeeds = size_t{Prefetcher::kMaxHorizon} * kExperts;
constexpr double kLayerUs = 100.0;
constexpr double kTransferUs = 60.0;

class RandomDecoding {
 public:
  RandomDecoding(uint32_t seed, PolicyKind policy, CacheScope scope)
      : random_(seed),
        config_{.top_k = kTopK, .expert_bytes = kChunks, .policy = policy, .scope = scope},
        num_slots_(kLayers * Draw(kTopK, 5)),
        table_(kLayers, kExperts, num_slots_),
        planner_(table_, config_),
        queue_(num_slots_, /*chunk_bytes=*/1, /*max_chunks_in_flight=*/2),
        prefetcher_(table_.view(), planner_, queue_, config_, Prefetcher::kUntried),
        post_([this](SlotId slot, Tick needed_at) { PostPrefetch(slot, needed_at); }),
        held_(static_cast<size_t>(num_slots_), Copied{}),
        needed_at_(static_cast<size_t>(num_slots_), kNever) {
    for (Copied& copied : held_) copied.fill(ExpertIndex::kNone);
  }

  void Run(int num_tokens) {
    for (int token = 0; token < num_tokens && !testing::Test::HasFailure(); ++token) {
      SCOPED_TRACE("token " + std::to_string(token));
      if (Draw(0, 1)) {
        prefetcher_.BeginToken(1, Draw(1, 100));
        layer_ = kLayers - 1;
        Decide();
      }
      for (layer_ = 0; layer_ < kLayers; ++layer_) RunLayer();
    }
    while (CopyChunk()) {
    }
    CheckSlots();
    for (int32_t s = 0; s < num_slots_; ++s) EXPECT_TRUE(queue_.IsIdle(SlotId{s}));
  }

  // Prefetches that were decided anew; restored: withdrawn ones whose victim is there again;
  // dropped: those that had begun, and were overdue.
  int num_dropped() const { return num_dropped_; }
  int num_kept() const { return num_kept_; }
  int num_withdrawn() const { return num_withdrawn_; }
  int num_restored() const { return num_restored_; }

 private:
  using Copied = std::array<ExpertIndex, kChunks>;

  int32_t Draw(int32_t lowest, int32_t highest) {
    return std::uniform_int_distribution<int32_t>(lowest, highest)(random_);
  }

  void RunLayer() {
    const std::vector<int64_t> routed = {Draw(0, kExperts - 1), Draw(0, kExperts - 1)};
    const Plan* plan = planner_.PlanLayer(layer_, routed, 1, ++now_);
    while (plan == nullptr) {  // transfers hold every slot
      CopyChunk();
      plan = planner_.PlanLayer(layer_, routed, 1, ++now_);
    }
    prefetcher_.RecordPlan(*plan);
    for (const PlanRow& row : plan->rows) {
      if (row.state == RowState::kLoading) queue_.Promote(row.slot, now_);
      if (row.state == RowState::kMiss && row.wave == 0) PostRow(row.slot);
    }
    CopySome();
    prefetcher_.BeginLayer({.compute_us = kLayerUs,
                            .stall_us = kTransferUs,
                            .bytes_per_second = kChunks / (kTransferUs * 1e-6)});
    Decide();
    for (int32_t r = 0; r < std::ssize(plan->rows); ++r) ComputeRow(*plan, r);
    CopySome();
  }

  void ComputeRow(const Plan& plan, int32_t r) {
    const SlotId slot = plan.rows[static_cast<size_t>(r)].slot;
    while (table_.view().slot_state[Index(slot)] != SlotState::kReady) CopyChunk();
    const ExpertId expert{layer_, plan.rows[static_cast<size_t>(r)].expert};
    EXPECT_EQ(table_.view().slot_expert[Index(slot)], ToIndex(table_.view(), expert));
    CheckSlots();
    if (planner_.Advance(r) != kNoRow) PostRow(slot);
  }

  void PostRow(SlotId slot) {
    queue_.Post(slot, table_.view().slot_expert[Index(slot)], kChunks, TransferClass::kDemand,
                now_);
  }

  void PostPrefetch(SlotId slot, Tick needed_at) {
    queue_.Post(slot, table_.view().slot_expert[Index(slot)], kChunks, TransferClass::kPrefetch,
                needed_at);
    needed_at_[static_cast<size_t>(Index(slot))] = needed_at;
  }

  // Some experts of each layer ahead, most of which were foreseen before; but minds change.
  void Decide() {
    for (float& need : need_) need = 0.0F;
    for (int32_t d = 1; d <= Prefetcher::kMaxHorizon; ++d) {
      for (int32_t i = 0; i < 2; ++i) {
        const int32_t expert =
            Draw(0, 2) ? static_cast<int32_t>(now_ + d + i) % kExperts : Draw(0, kExperts - 1);
        need_[static_cast<size_t>((d - 1) * kExperts + expert)] =
            0.5F + 0.01F * static_cast<float>(Draw(0, 50));
      }
    }
    std::vector<Before> before_decision;
    for (int32_t s = 0; s < num_slots_; ++s) {
      const SlotTableView& table = table_.view();
      before_decision.push_back({table.slot_state[s], table.slot_expert[s],
                                 queue_.HasChunksOut(SlotId{s}),
                                 needed_at_[static_cast<size_t>(s)]});
    }
    const int64_t before = num_allocations;
    prefetcher_.PrefetchNeeded(need_, post_);
    EXPECT_EQ(num_allocations, before);
    for (int32_t s = 0; s < num_slots_; ++s) {
      CheckDecision(SlotId{s}, before_decision[static_cast<size_t>(s)]);
    }
    CheckSlots();
  }

  struct Before {
    SlotState state;
    ExpertIndex expert;
    bool has_chunks_out;
    Tick needed_at;
  };

  void CheckDecision(SlotId slot, const Before& before) {
    const SlotState state = table_.view().slot_state[Index(slot)];
    const ExpertIndex expert = table_.view().slot_expert[Index(slot)];
    const bool is_changed = expert != before.expert;
    if (before.state == SlotState::kSubmitted && is_changed) {
      EXPECT_FALSE(before.has_chunks_out) << "something is copied into it";
      EXPECT_LE(before.needed_at, now_) << "it may still be needed";
      ++num_dropped_;
    }
    if (before.state == SlotState::kPosted) {
      num_withdrawn_ += is_changed;
      num_restored_ += is_changed && state == SlotState::kReady;
      num_kept_ += !is_changed && queue_.IsWaitingPrefetch(slot);
    }
    if (!queue_.IsWaitingPrefetch(slot) || prefetcher_.horizon() == 0) return;
    const Tick distance = needed_at_[static_cast<size_t>(Index(slot))] - now_;
    ASSERT_GE(distance, 1);
    ASSERT_LE(distance, prefetcher_.horizon());
    const ExpertId id = ToId(table_.view(), expert);
    EXPECT_EQ(id.layer, (layer_ + distance) % kLayers);
    EXPECT_GT(need_[static_cast<size_t>((distance - 1) * kExperts + id.expert)], 0.0F)
        << "nobody expects it any more";
  }

  void CheckSlots() {
    const SlotTableView& table = table_.view();
    for (int32_t s = 0; s < num_slots_; ++s) {
      const SlotState state = table.slot_state[s];
      const ExpertIndex expert = table.slot_expert[s];
      EXPECT_EQ(InFlight(state), !queue_.IsIdle(SlotId{s})) << "slot " << s;
      EXPECT_EQ(state == SlotState::kEmpty, expert == ExpertIndex::kNone) << "slot " << s;
      if (expert == ExpertIndex::kNone) continue;
      EXPECT_EQ(table.expert_slot[Index(expert)], SlotId{s}) << "resident twice";
      if (state != SlotState::kReady) continue;
      for (const ExpertIndex copied : held_[static_cast<size_t>(s)]) {
        EXPECT_EQ(copied, expert) << "slot " << s << " holds something else";
      }
    }
  }

  void CopySome() {
    for (int32_t i = Draw(0, 6); i > 0; --i) CopyChunk();
  }

  // Hands out all that may be out, and ends one of them; false if there is none.
  bool CopyChunk() {
    while (const std::optional<Chunk> chunk = queue_.Next()) {
      planner_.Submit(chunk->slot);
      out_.push_back(*chunk);
    }
    if (out_.empty()) return false;
    const Chunk chunk = out_.front();
    out_.erase(out_.begin());
    const bool succeeds = !queue_.IsPrefetch(chunk.slot) || Draw(0, 9) > 0;
    held_[static_cast<size_t>(Index(chunk.slot))][chunk.offset_bytes] =
        succeeds ? chunk.expert : ExpertIndex::kNone;
    switch (queue_.Finish(chunk, succeeds)) {
      case TransferStatus::kInFlight:
        break;
      case TransferStatus::kDone:
        planner_.Publish(chunk.slot);
        break;
      case TransferStatus::kDropped:
      case TransferStatus::kFailed:
        planner_.Drop(chunk.slot);
    }
    return true;
  }

  std::mt19937 random_;
  PlannerConfig config_;
  int32_t num_slots_;
  SlotTable table_;
  Planner planner_;
  TransferQueue queue_;
  Prefetcher prefetcher_;
  Prefetcher::Post post_;
  std::vector<Copied> held_;     // [num_slots] whose chunks are in each
  std::vector<Tick> needed_at_;  // [num_slots] of the slot's last prefetch
  std::array<float, kNeeds> need_{};
  std::vector<Chunk> out_;
  int32_t layer_ = 0;
  Tick now_ = 0;
  int num_kept_ = 0, num_withdrawn_ = 0, num_restored_ = 0, num_dropped_ = 0;
};

class PrefetchWithdrawalTest : public testing::TestWithParam<PolicyAndScope> {};

TEST_P(PrefetchWithdrawalTest, SlotsHoldWhatTheyAreSaidTo) {
  const auto [policy, scope] = GetParam();
  int kept = 0, withdrawn = 0, restored = 0, dropped = 0;
  for (uint32_t seed = 0; seed < 20 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    RandomDecoding decoding(seed, policy, scope);
    decoding.Run(100);
    kept += decoding.num_kept();
    withdrawn += decoding.num_withdrawn();
    restored += decoding.num_restored();
    dropped += decoding.num_dropped();
  }
  const bool prefetches = policy != PolicyKind::kOnDemand;
  EXPECT_EQ(kept > 100, prefetches) << kept;
  EXPECT_EQ(withdrawn > 100, prefetches) << withdrawn;
  EXPECT_EQ(restored > 100, prefetches) << restored;
  EXPECT_EQ(dropped > 100, prefetches) << dropped;
}

INSTANTIATE_TEST_SUITE_P(AllPolicies, PrefetchWithdrawalTest, EveryPolicyAndScope(),
                         NameOfPolicyAndScope);

}  // namespace
}  // namespace expertflow
