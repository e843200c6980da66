// Drives the transfer queue with random operations and compares it with a reference after each.

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "allocation_counter.h"
#include "core/transfer_queue.h"
#include "reference_queue.h"

namespace expertflow {
namespace {

class RandomTransfers {
 public:
  explicit RandomTransfers(uint64_t seed)
      : random_(seed),
        num_slots_(Draw(1, 40)),
        chunk_bytes_(static_cast<size_t>(Draw(1, 300))),
        max_chunks_in_flight_(Draw(1, 4)),
        failure_percent_(Draw(0, 2) * 10),
        queue_(num_slots_, chunk_bytes_, max_chunks_in_flight_),
        reference_(chunk_bytes_, max_chunks_in_flight_) {}

  void Run(int num_steps) {
    for (int i = 0; i < num_steps && !testing::Test::HasFailure(); ++i) {
      SCOPED_TRACE("step " + std::to_string(i));
      Step();
    }
    while (!testing::Test::HasFailure() && Drain()) {
    }
    EXPECT_EQ(num_ended_, num_posted_) << "every transfer ends exactly once";
    EXPECT_EQ(queue_.queued_bytes(), 0U);
    EXPECT_EQ(queue_.chunks_in_flight(), 0);
  }

 private:
  int32_t Draw(int32_t lowest, int32_t highest) {
    return std::uniform_int_distribution<int32_t>(lowest, highest)(random_);
  }

  void Step() {
    const SlotId slot{Draw(0, num_slots_ - 1)};
    switch (Draw(0, 10)) {
      case 0:
      case 1:
      case 2:
        if (reference_.IsIdle(slot)) Post(slot);
        break;
      case 3:
        if (!reference_.IsIdle(slot) && !reference_.IsCancelled(slot)) Promote(slot);
        break;
      case 4:
        if (!reference_.IsIdle(slot) && Draw(0, 2) == 0) Cancel(slot);
        break;
      case 5:
        if (reference_.IsQueuedPrefetch(slot)) Reschedule(slot);
        break;
      case 6:
      case 7:
      case 8:
        TakeNext();
        break;
      default:
        if (!out_.empty()) FinishOne();
    }
    ASSERT_EQ(queue_.IsIdle(slot), reference_.IsIdle(slot));
    ASSERT_EQ(queue_.copied_bytes(slot), reference_.copied_bytes(slot));
    ASSERT_EQ(queue_.queued_bytes(), reference_.queued_bytes());
    ASSERT_EQ(queue_.IsQueuedPrefetch(slot), reference_.IsQueuedPrefetch(slot));
    ASSERT_EQ(queue_.IsWaitingPrefetch(slot), reference_.IsWaitingPrefetch(slot));
    const Tick until = Draw(0, 6);
    ASSERT_EQ(queue_.prefetch_bytes_until(until), reference_.prefetch_bytes_until(until));
    ASSERT_EQ(queue_.chunks_in_flight(), reference_.chunks_in_flight());
    ASSERT_LE(queue_.chunks_in_flight(), max_chunks_in_flight_);
  }

  bool Drain() {
    const bool took = TakeNext();
    if (out_.empty()) return took;
    FinishOne();
    return true;
  }

  // Runs a call of the queue, which must not allocate.
  template <class Call>
  auto WithoutAllocating(Call call) {
    struct Check {
      const int64_t before = num_allocations;
      ~Check() { EXPECT_EQ(num_allocations, before) << "the queue must not allocate"; }
    };
    const Check check;
    return call();
  }

  void Post(SlotId slot) {
    const ExpertIndex expert{Draw(0, 1000)};
    const auto num_bytes = static_cast<size_t>(Draw(1, static_cast<int32_t>(5 * chunk_bytes_)));
    const auto transfer_class = Draw(0, 1) ? TransferClass::kDemand : TransferClass::kPrefetch;
    const Tick needed_at = Draw(0, 6);  // few, so that many tie
    WithoutAllocating([&] { queue_.Post(slot, expert, num_bytes, transfer_class, needed_at); });
    reference_.Post(slot, expert, num_bytes, transfer_class, needed_at);
    EXPECT_EQ(queue_.IsPrefetch(slot), transfer_class == TransferClass::kPrefetch);
    num_bytes_[slot] = num_bytes;
    handed_out_[slot] = 0;
    ++num_posted_;
  }

  void Promote(SlotId slot) {
    const Tick needed_at = Draw(0, 6);
    WithoutAllocating([&] { queue_.Promote(slot, needed_at); });
    reference_.Promote(slot, needed_at);
    EXPECT_FALSE(queue_.IsPrefetch(slot));
  }

  void Reschedule(SlotId slot) {
    const Tick needed_at = Draw(0, 6);
    WithoutAllocating([&] { queue_.Reschedule(slot, needed_at); });
    reference_.Reschedule(slot, needed_at);
  }

  void Cancel(SlotId slot) {
    const bool gone = WithoutAllocating([&] { return queue_.Cancel(slot); });
    ASSERT_EQ(gone, reference_.Cancel(slot));
    if (gone) ++num_ended_;
  }

  bool TakeNext() {
    const std::optional<Chunk> chunk = WithoutAllocating([&] { return queue_.Next(); });
    const std::optional<Chunk> expected = reference_.Next();
    EXPECT_EQ(chunk.has_value(), expected.has_value());
    if (!chunk || !expected) return false;
    EXPECT_EQ(
        std::tuple(chunk->slot, chunk->expert, chunk->offset_bytes, chunk->num_bytes),
        std::tuple(expected->slot, expected->expert, expected->offset_bytes, expected->num_bytes));
    size_t& handed_out = handed_out_[chunk->slot];
    if (chunk->offset_bytes == 0) handed_out = 0;  // the first try, or a new one
    EXPECT_EQ(chunk->offset_bytes, handed_out) << "every byte goes out once, in order";
    handed_out += chunk->num_bytes;
    EXPECT_LE(handed_out, num_bytes_[chunk->slot]);
    out_.push_back(*chunk);
    return true;
  }

  void FinishOne() {
    const auto i = static_cast<size_t>(Draw(0, static_cast<int32_t>(out_.size()) - 1));
    const Chunk chunk = out_[i];
    out_.erase(out_.begin() + static_cast<ptrdiff_t>(i));
    const bool succeeded = Draw(0, 99) >= failure_percent_;
    const TransferStatus status =
        WithoutAllocating([&] { return queue_.Finish(chunk, succeeded); });
    ASSERT_EQ(status, reference_.Finish(chunk, succeeded));
    if (status == TransferStatus::kInFlight) return;
    ++num_ended_;
    EXPECT_TRUE(queue_.IsIdle(chunk.slot));
    if (status == TransferStatus::kDone) {
      EXPECT_EQ(handed_out_[chunk.slot], num_bytes_[chunk.slot]) << "done means all of it";
    }
  }

  std::mt19937_64 random_;
  int32_t num_slots_;
  size_t chunk_bytes_;
  int32_t max_chunks_in_flight_;
  int32_t failure_percent_;
  TransferQueue queue_;
  ReferenceQueue reference_;
  std::vector<Chunk> out_;
  std::map<SlotId, size_t> num_bytes_;
  std::map<SlotId, size_t> handed_out_;  // of the latest try
  int num_posted_ = 0;
  int num_ended_ = 0;
};

TEST(TransferQueuePropertyTest, DecidesAsTheReferenceDoes) {
  for (uint64_t seed = 0; seed < 400 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    RandomTransfers(seed).Run(600);
  }
}

}  // namespace
}  // namespace expertflow
