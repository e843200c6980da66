#include "cuda/pinned_pool.h"

#include <utility>

#include "cuda/cuda_error.h"
#include "cuda/device_guard.h"
#include "cuda/relaxed_capture.h"
#include "host/fork.h"

namespace expertflow {

PinnedPool::PinnedPool(std::shared_ptr<RamPool> pool, int device, bool is_required)
    : pool_(std::move(pool)),
      device_(device),
      is_required_(is_required),
      fork_generation_(ForkGeneration()) {}

PinnedPool::~PinnedPool() {
  if (ForkGeneration() == fork_generation_) return;
  // Left alone, here and in the driver.
  static_cast<void>(new std::vector<HostRegistration>(std::move(registrations_)));
}

void PinnedPool::Pin(size_t first, size_t last) {
  if (failure()) return;
  const DeviceGuard guard(device_);
  const RelaxedCapture relaxed;
  std::byte* begin = pool_->expert_data(static_cast<ExpertIndex>(first));
  try {
    HostRegistration registration({begin, (last - first) * pool_->stride_bytes()});
    const std::scoped_lock lock(mutex_);
    registrations_.push_back(std::move(registration));
    num_pinned_ += last - first;
  } catch (const CudaError& error) {
    if (is_required_) throw;
    const std::scoped_lock lock(mutex_);
    failure_ = error.what();
    registrations_.clear();
    num_pinned_ = 0;
  }
}

bool PinnedPool::is_pinned() const {
  const std::scoped_lock lock(mutex_);
  return num_pinned_ == pool_->num_experts();
}

std::optional<std::string> PinnedPool::failure() const {
  const std::scoped_lock lock(mutex_);
  return failure_;
}

}  // namespace expertflow
