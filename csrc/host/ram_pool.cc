#include "host/ram_pool.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace expertflow {

RamPool::RamPool(const ExpertLayout& layout, size_t num_experts, int numa_node)
    : expert_bytes_(layout.slot_bytes()),
      stride_bytes_(layout.pool_bytes_per_expert()),
      num_experts_(num_experts),
      memory_(num_experts * stride_bytes_) {
  memory_.PreferNode(numa_node);
}

void RamPool::Read(ExpertIndex expert, size_t offset_bytes, std::span<std::byte> to) const {
  std::memcpy(to.data(), expert_data(expert) + offset_bytes, to.size());
}

PoolFill::PoolFill(std::shared_ptr<RamPool> pool, std::shared_ptr<const ExpertSource> source,
                   int32_t num_threads, OnBlockFilled on_block_filled)
    : pool_(std::move(pool)),
      source_(std::move(source)),
      on_block_filled_(std::move(on_block_filled)),
      block_experts_(std::max(kBlockBytes / pool_->stride_bytes(), size_t{1})),
      num_filled_((pool_->num_experts() + block_experts_ - 1) / block_experts_),
      threads_running_(num_threads) {
  if (num_threads <= 0) throw std::invalid_argument("filling a pool needs at least one thread");
  CheckHolds(*source_, pool_->num_experts(), pool_->expert_bytes());
  try {
    for (int32_t i = 0; i < num_threads; ++i) threads_.emplace_back([this] { Run(); });
  } catch (...) {  // the system has no more threads
    Cancel();
    JoinThreads();
    throw;
  }
}

PoolFill::~PoolFill() {
  Cancel();
  JoinThreads();
}

void PoolFill::Run() {
  try {
    while (!stop_.load(std::memory_order_relaxed)) {
      const size_t expert = next_expert_.fetch_add(1, std::memory_order_relaxed);
      if (expert >= pool_->num_experts()) break;
      const auto index = static_cast<ExpertIndex>(expert);
      source_->Read(index, 0, {pool_->expert_data(index), pool_->expert_bytes()});
      if (on_block_filled_) NoteFilled(expert);
      bytes_done_.fetch_add(pool_->expert_bytes(), std::memory_order_relaxed);
    }
  } catch (...) {
    const std::scoped_lock lock(mutex_);
    if (!error_) error_ = std::current_exception();
    Cancel();
  }
  const std::scoped_lock lock(mutex_);
  --threads_running_;
  ended_.notify_all();
}

void PoolFill::NoteFilled(size_t expert) {
  const size_t block = expert / block_experts_;
  const size_t first = block * block_experts_;
  const size_t last = std::min(first + block_experts_, pool_->num_experts());
  if (num_filled_[block].fetch_add(1) + 1 == last - first) on_block_filled_(first, last);
}

bool PoolFill::WaitFor(std::chrono::duration<double> timeout) {
  std::unique_lock lock(mutex_);
  return ended_.wait_for(lock, timeout, [this] { return threads_running_ == 0; });
}

void PoolFill::JoinThreads() {
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void PoolFill::Join() {
  JoinThreads();
  if (error_) std::rethrow_exception(error_);
  if (bytes_done() < bytes_total())
    throw std::runtime_error("filling the expert pool was cancelled");
}

}  // namespace expertflow
