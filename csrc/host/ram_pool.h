#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/expert_layout.h"
#include "core/expert_source.h"
#include "host/mapped_memory.h"

namespace expertflow {

// All experts of a model in RAM, one after the other, each in slot layout and page-aligned.
class RamPool : public ExpertSource {
 public:
  // Reserves the memory, on NUMA node `numa_node` unless that is negative; it is taken while the
  // pool is filled. Throws std::bad_alloc.
  RamPool(const ExpertLayout& layout, size_t num_experts, int numa_node = -1);

  void Read(ExpertIndex expert, size_t offset_bytes, std::span<std::byte> to) const override;

  std::byte* expert_data(ExpertIndex expert) const {
    return memory_.data() + static_cast<size_t>(Index(expert)) * stride_bytes_;
  }
  size_t num_experts() const override { return num_experts_; }
  size_t expert_bytes() const override { return expert_bytes_; }
  size_t stride_bytes() const { return stride_bytes_; }
  size_t num_bytes() const { return memory_.num_bytes(); }

 private:
  size_t expert_bytes_;
  size_t stride_bytes_;
  size_t num_experts_;
  MappedMemory memory_;
};

// Fills a pool by parallel reads, straight into its memory. Runs in its own threads from
// construction to Join.
class PoolFill {
 public:
  // What to do with experts `first` to `last`, exclusive, once they are read, e.g. pin them.
  using OnBlockFilled = std::function<void(size_t first, size_t last)>;

  // `on_block_filled` is called by the reading threads, for blocks of about kBlockBytes; what it
  // throws ends the fill. Throws std::invalid_argument if the source holds other experts than the
  // pool, or for no threads.
  PoolFill(std::shared_ptr<RamPool> pool, std::shared_ptr<const ExpertSource> source,
           int32_t num_threads, OnBlockFilled on_block_filled = {});
  // Cancels and waits.
  ~PoolFill();

  size_t bytes_done() const { return bytes_done_.load(std::memory_order_relaxed); }
  size_t bytes_total() const { return pool_->num_experts() * pool_->expert_bytes(); }
  // Waits until every thread has ended (all is read, or the fill failed or was cancelled), at most
  // this long. Returns whether they have.
  bool WaitFor(std::chrono::duration<double> timeout);
  // The threads stop at the next expert.
  void Cancel() { stop_.store(true, std::memory_order_relaxed); }
  // Waits for the threads, then throws the first reader's exception, or std::runtime_error if the
  // fill was cancelled.
  void Join();

 private:
  static constexpr size_t kBlockBytes = size_t{1} << 28;

  void Run();
  void NoteFilled(size_t expert);
  void JoinThreads();

  std::shared_ptr<RamPool> pool_;
  std::shared_ptr<const ExpertSource> source_;
  OnBlockFilled on_block_filled_;
  size_t block_experts_;
  std::vector<std::atomic<size_t>> num_filled_;  // experts, of each block
  std::atomic<size_t> next_expert_{0};
  std::atomic<size_t> bytes_done_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;  // guards the three below
  std::condition_variable ended_;
  int32_t threads_running_;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
};

}  // namespace expertflow
