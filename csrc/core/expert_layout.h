#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace expertflow {

// One tensor of an expert, e.g. its gate and up projection.
struct Segment {
  std::string role;
  DType dtype;
  size_t offset_bytes;  // from the start of the slot
  size_t num_bytes;
};

struct SegmentSpec {
  std::string role;
  DType dtype;
  size_t num_elements;
};

constexpr size_t kSlotAlignment = 256;  // of segments and of slots
constexpr size_t kPoolAlignment =
    4096;  // of experts in a pool: whole pages, for direct I/O and registration

constexpr size_t AlignUp(size_t bytes, size_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

// Where the tensors of one expert lie within its slot. All experts of a model share one layout.
class ExpertLayout {
 public:
  // Places the segments one after the other. Throws std::invalid_argument if there are none or one
  // is empty.
  explicit ExpertLayout(const std::vector<SegmentSpec>& specs);

  const std::vector<Segment>& segments() const { return segments_; }
  size_t slot_bytes() const { return slot_bytes_; }
  size_t pool_bytes_per_expert() const { return AlignUp(slot_bytes_, kPoolAlignment); }

  // The segment that holds the byte at `offset_bytes`. Throws std::invalid_argument if none does.
  const Segment& SegmentAt(size_t offset_bytes) const;

 private:
  std::vector<Segment> segments_;
  size_t slot_bytes_ = 0;
};

}  // namespace expertflow
