// A block of threads of the CPU, so that what a CUDA block does together also runs, and is checked
// by the thread sanitizer, where there is no GPU.
#pragma once

#include <atomic>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "core/plan_phase.h"

namespace expertflow {

// What the threads of one block share.
class HostBlockState {
 public:
  HostBlockState(int32_t num_threads, int32_t warp_size, std::function<void()> end_previous)
      : num_threads(num_threads),
        end_previous(std::move(end_previous)),
        barrier(num_threads),
        values(static_cast<size_t>(num_threads)) {
    for (int32_t first = 0; first < num_threads; first += warp_size) {
      warp_barriers.push_back(std::make_unique<std::barrier<>>(warp_size));
    }
  }

  const int32_t num_threads;
  const std::function<void()> end_previous;
  std::barrier<> barrier;
  std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
  std::vector<uint32_t> values;  // of the warps' threads, while they are exchanged
};

// The `Block` of core/block_selection.h and core/block_planner.h. Warps are small, so that a few
// threads are many of them.
class HostBlock {
 public:
  static constexpr int32_t kWarpSize = 8;

  HostBlock(HostBlockState& state, int32_t thread) : state_(state), thread_(thread) {}

  int32_t thread() const { return thread_; }
  int32_t num_threads() const { return state_.num_threads; }
  void Sync() { state_.barrier.arrive_and_wait(); }

  uint32_t Ballot(bool flag) {
    return Exchange(flag, [](const uint32_t* of_lanes) {
      uint32_t bits = 0;
      for (int32_t lane = 0; lane < kWarpSize; ++lane) bits |= of_lanes[lane] << lane;
      return bits;
    });
  }
  uint32_t OfLane(uint32_t value, int32_t lane) {
    return Exchange(value, [lane](const uint32_t* of_lanes) { return of_lanes[lane]; });
  }

  template <class Int>
  Int Add(Int& counter, Int amount) {
    return std::atomic_ref(counter).fetch_add(amount);
  }

  template <class Int>
  void Min(Int& value, Int other) {
    std::atomic_ref shared(value);
    Int found = shared.load();
    while (other < found && !shared.compare_exchange_weak(found, other)) {
    }
  }

  void WaitForPrevious() {
    if (!state_.end_previous) return;  // no barrier that a CUDA block does not have
    Sync();
    if (thread_ == 0) state_.end_previous();
    Sync();
  }
  void SyncWarp() {}
  void Expect(uint64_t& barrier, int32_t num_arrivals) {
    barrier = static_cast<uint64_t>(num_arrivals);
  }
  void Arrive(uint64_t& barrier) {
    std::atomic_ref left(barrier);
    if (--left == 0) left.notify_all();
  }
  void Await(uint64_t& barrier) {
    const std::atomic_ref left(barrier);
    while (const uint64_t found = left) left.wait(found);
  }
  void Mark(PlanPhase) {}
  template <class Words>
  void CopyAsync(Words& to, const Words& from) {
    to = from;
  }
  void WaitForCopies() {}

  void Release(uint64_t& word, uint64_t value) {
    std::atomic_ref(word).store(value, std::memory_order_release);
  }

 private:
  // What `read` makes of the values of the warp's threads.
  template <class Read>
  uint32_t Exchange(uint32_t value, const Read& read) {
    const int32_t first = thread_ / kWarpSize * kWarpSize;
    std::barrier<>& barrier = *state_.warp_barriers[static_cast<size_t>(thread_ / kWarpSize)];
    state_.values[static_cast<size_t>(thread_)] = value;
    barrier.arrive_and_wait();
    const uint32_t result = read(state_.values.data() + first);
    barrier.arrive_and_wait();
    return result;
  }

  HostBlockState& state_;
  const int32_t thread_;
};

// Runs `body(block)` on `num_threads` threads, a multiple of the warps' size. If there is an
// `end_previous`, it runs when all wait for the work before them in the stream, and is the end of
// that.
template <class Body>
void RunHostBlock(int32_t num_threads, const Body& body,
                  std::function<void()> end_previous = nullptr) {
  HostBlockState state(num_threads, HostBlock::kWarpSize, std::move(end_previous));
  std::vector<std::jthread> threads;
  for (int32_t t = 0; t < num_threads; ++t) {
    threads.emplace_back([&state, &body, t] {
      HostBlock block(state, t);
      body(block);
    });
  }
}

}  // namespace expertflow
