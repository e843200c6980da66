#include "core/expert_layout.h"

#include <stdexcept>

namespace expertflow {

ExpertLayout::ExpertLayout(const std::vector<SegmentSpec>& specs) {
  if (specs.empty()) throw std::invalid_argument("an expert needs at least one segment");
  for (const SegmentSpec& spec : specs) {
    if (spec.num_elements == 0) {
      throw std::invalid_argument("segment '" + spec.role + "' of the expert is empty");
    }
    const size_t num_bytes = spec.num_elements * ElementBytes(spec.dtype);
    segments_.push_back({spec.role, spec.dtype, slot_bytes_, num_bytes});
    slot_bytes_ = AlignUp(slot_bytes_ + num_bytes, kSlotAlignment);
  }
}

const Segment& ExpertLayout::SegmentAt(size_t offset_bytes) const {
  for (const Segment& segment : segments_) {
    if (offset_bytes >= segment.offset_bytes &&
        offset_bytes < segment.offset_bytes + segment.num_bytes) {
      return segment;
    }
  }
  throw std::invalid_argument("no segment holds byte " + std::to_string(offset_bytes) +
                              " of an expert");
}

}  // namespace expertflow
