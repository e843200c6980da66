// A block of threads of the CPU, so that what a CUDA block does together also runs, and is checked
// by the thread sanitizer, where there is no GPU.
#pragma once

#include <atomic>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace expertflow {

// What the threads of one block share.
class HostBlockState {
 public:
  explicit HostBlockState(int32_t num_threads)
      : num_threads(num_threads),
        barrier(num_threads),
        shuffled(static_cast<size_t>(num_threads)) {}

  const int32_t num_threads;
  std::barrier<> barrier;
  std::vector<int64_t> shuffled;
};

// The `Block` of core/block_selection.h and core/block_planner.h. A shuffle must be called by all
// threads of the block, not only by those of a warp.
class HostBlock {
 public:
  HostBlock(HostBlockState& state, int32_t thread) : state_(state), thread_(thread) {}

  int32_t thread() const { return thread_; }
  int32_t num_threads() const { return state_.num_threads; }
  void Sync() { state_.barrier.arrive_and_wait(); }

  int64_t ShuffleXor(int64_t value, int32_t mask) {
    state_.shuffled[static_cast<size_t>(thread_)] = value;
    Sync();
    const int64_t other = state_.shuffled[static_cast<size_t>(thread_ ^ mask)];
    Sync();
    return other;
  }

  template <class Int>
  Int Add(Int& counter, Int amount) {
    return std::atomic_ref(counter).fetch_add(amount);
  }

  void Min(int32_t& value, int32_t other) {
    std::atomic_ref shared(value);
    int32_t found = shared.load();
    while (other < found && !shared.compare_exchange_weak(found, other)) {
    }
  }

  void WaitForPrevious() {}
  void CopyAsync(int32_t& to, const int32_t& from) { to = from; }
  void WaitForCopies() {}

  void Release(uint64_t& word, uint64_t value) {
    std::atomic_ref(word).store(value, std::memory_order_release);
  }

 private:
  HostBlockState& state_;
  const int32_t thread_;
};

// Runs `body(block)` on `num_threads` threads.
template <class Body>
void RunHostBlock(int32_t num_threads, const Body& body) {
  HostBlockState state(num_threads);
  std::vector<std::jthread> threads;
  for (int32_t t = 0; t < num_threads; ++t) {
    threads.emplace_back([&state, &body, t] {
      HostBlock block(state, t);
      body(block);
    });
  }
}

}  // namespace expertflow
