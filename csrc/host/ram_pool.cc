#include "host/ram_pool.h"

#include <cstring>
#include <stdexcept>
#include <utility>

namespace expertflow {

RamPool::RamPool(const ExpertLayout& layout, size_t num_experts)
    : expert_bytes_(layout.slot_bytes()),
      stride_bytes_(layout.pool_bytes_per_expert()),
      num_experts_(num_experts),
      memory_(num_experts * stride_bytes_) {}

void RamPool::Read(ExpertIndex expert, size_t offset_bytes, std::span<std::byte> to) const {
  std::memcpy(to.data(), expert_data(expert) + offset_bytes, to.size());
}

PoolFill::PoolFill(std::shared_ptr<RamPool> pool, std::shared_ptr<const ExpertSource> source,
                   int32_t num_threads)
    : pool_(std::move(pool)), source_(std::move(source)), threads_running_(num_threads) {
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
