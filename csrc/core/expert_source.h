#pragma once

#include <cstddef>
#include <span>

#include "core/ids.h"

namespace expertflow {

// Where experts come from: RAM, a checkpoint file; later NVMe or a peer device.
class ExpertSource {
 public:
  virtual ~ExpertSource() = default;

  virtual size_t num_experts() const = 0;  // of all layers
  virtual size_t expert_bytes() const = 0;

  // Fills `to` with the bytes of `expert`, in slot layout, from `offset_bytes` on. Called by
  // several threads at once, with ranges that begin at multiples of kSlotAlignment. Throws if not
  // every byte could be read; `to` is then undefined.
  virtual void Read(ExpertIndex expert, size_t offset_bytes, std::span<std::byte> to) const = 0;
};

// Throws std::invalid_argument unless `source` holds so many experts of this size.
void CheckHolds(const ExpertSource& source, size_t num_experts, size_t expert_bytes);

}  // namespace expertflow
