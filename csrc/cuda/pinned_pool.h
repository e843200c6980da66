#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/expert_source.h"
#include "cuda/host_registration.h"
#include "host/ram_pool.h"

namespace expertflow {

// A RAM pool that devices copy from directly, because its memory is page-locked. It is pinned block
// by block while it is filled: registering memory that was touched takes 0.04 s for each GiB, and
// so costs nearly nothing beside the reads.
class PinnedPool : public ExpertSource {
 public:
  // Pins nothing yet. Registrations are made on `device`, and serve every other one too.
  PinnedPool(std::shared_ptr<RamPool> pool, int device, bool is_required);
  // Unpins, but not in a forked child, which has no context of the device.
  ~PinnedPool() override;
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  // Pins the memory of experts `first` to `last`, exclusive. Thread-safe. If the system refuses, as
  // it does beyond the limit of locked memory: throws CudaError with the size if pinning is
  // required, else nothing is pinned any more, and `failure` says why.
  void Pin(size_t first, size_t last);

  std::optional<std::string> failure() const;

  // Whether all experts are pinned.
  bool is_pinned() const;

  const std::byte* expert_data(ExpertIndex expert) const { return pool_->expert_data(expert); }
  size_t num_experts() const override { return pool_->num_experts(); }
  size_t expert_bytes() const override { return pool_->expert_bytes(); }
  void Read(ExpertIndex expert, size_t offset_bytes, std::span<std::byte> to) const override {
    pool_->Read(expert, offset_bytes, to);
  }

 private:
  std::shared_ptr<RamPool> pool_;
  int device_;
  bool is_required_;
  int fork_generation_;
  mutable std::mutex mutex_;  // guards the three below
  std::vector<HostRegistration> registrations_;
  size_t num_pinned_ = 0;  // experts
  std::optional<std::string> failure_;
};

}  // namespace expertflow
