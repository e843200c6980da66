#include "cuda/pinned_pool.h"

#include <utility>

#include "cuda/device_guard.h"

namespace expertflow {

PinnedPool::PinnedPool(std::shared_ptr<RamPool> pool, int device)
    : pool_(std::move(pool)), device_(device) {}

void PinnedPool::Pin(size_t first, size_t last) {
  const DeviceGuard guard(device_);
  std::byte* begin = pool_->expert_data(static_cast<ExpertIndex>(first));
  HostRegistration registration({begin, (last - first) * pool_->stride_bytes()});
  const std::scoped_lock lock(mutex_);
  registrations_.push_back(std::move(registration));
  num_pinned_ += last - first;
}

bool PinnedPool::is_pinned() const {
  const std::scoped_lock lock(mutex_);
  return num_pinned_ == pool_->num_experts();
}

}  // namespace expertflow
