#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <stdexcept>
#include <thread>

#include "expert_cache_fixture.h"

namespace expertflow {
namespace {

using namespace std::chrono_literals;
using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

using ExpertCacheFaultsTest = ExpertCacheTest;

TEST_F(ExpertCacheFaultsTest, AnErrorNamesLayerAndExpertAndARetrySucceeds) {
  MakeCache(Options(4, 2));
  source_->set_faults({.fail_percent = 100});
  const Plan& plan = Begin(1, {6});
  EXPECT_THAT([&] { cache_->Wait(0); },
              ThrowsMessage<TransferError>(AllOf(HasSubstr("expert 6"), HasSubstr("MoE layer 1"),
                                                 HasSubstr("scripted failure"))));
  EXPECT_THROW(cache_->Wait(0), TransferError) << "and does so every time";
  EXPECT_THROW(cache_->Release(0), std::invalid_argument);
  EXPECT_EQ(plan.rows.size(), 1U);
  source_->set_faults({});
  Compute(Begin(1, {6}));
}

// An exception without a message was once taken for success.
TEST_F(ExpertCacheFaultsTest, EveryKindOfExceptionIsAnError) {
  std::atomic<bool> throws_number{false};
  source_->set_hook([&](ExpertIndex, size_t) {
    if (throws_number) throw 7;
    throw std::runtime_error("");
  });
  MakeCache(Options(4));
  Begin(0, {0});
  EXPECT_THROW(cache_->Wait(0), TransferError);
  throws_number = true;
  Begin(0, {1});
  EXPECT_THROW(cache_->Wait(0), TransferError);
  cache_.reset();  // ends the reads that use the hook
}

TEST_F(ExpertCacheFaultsTest, AFailedPrefetchIsSilent) {
  MakeCache(Options(4));
  source_->set_faults({.fail_percent = 100});
  Prefetch(0, {3, 4});
  WaitUntil([&] { return source_->num_reads() >= 2; });
  source_->set_faults({});
  const Plan& plan = Begin(0, {3, 4});
  Compute(plan);
  EXPECT_LE(Total().wasted_prefetch_bytes, Total().prefetch_bytes);
}

TEST_F(ExpertCacheFaultsTest, ALateHitWhosePrefetchFailsIsLoadedAgain) {
  std::latch promoted(1);
  std::atomic<bool> has_begun{false}, has_failed{false};
  source_->set_hook([&](ExpertIndex, size_t) {
    has_begun = true;
    promoted.wait();
    if (!has_failed.exchange(true)) throw std::runtime_error("once");
  });
  MakeCache(Options(2));
  Prefetch(0, {0});
  Prefetch(1, {5});  // the other slot, so that a miss must follow the late hit
  WaitUntil([&] { return has_begun.load(); });
  const Plan& plan = Begin(0, {0, 2});
  promoted.count_down();
  cache_->Wait(0);
  EXPECT_TRUE(source_->Holds(cache_->slot_data(plan.rows[0].slot), ExpertIndex{0}));
  EXPECT_THROW(cache_->Wait(1), std::invalid_argument) << "its slot is taken; nothing failed";
  Compute(plan);
  cache_.reset();  // ends the reads that use the hook
}

TEST_F(ExpertCacheFaultsTest, AFailedRowDoesNotLoseItsErrorToAPrefetch) {
  MakeCache(Options(2));
  source_->set_faults({.fail_percent = 100});
  Begin(0, {3});
  WaitUntil([&] { return source_->num_reads() >= 1; });
  std::this_thread::sleep_for(5ms);  // the worker reports the failure
  Prefetch(1, {1, 2, 4, 5});
  EXPECT_THROW(cache_->Wait(0), TransferError);
}

}  // namespace
}  // namespace expertflow
