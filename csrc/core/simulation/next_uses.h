#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/trace.h"

namespace expertflow {

// When each expert of a trace is used next: what Belady's policy ranks by. All uses lie in one flat
// array, expert by expert, with a cursor for each expert.
class NextUses {
 public:
  static constexpr int64_t kNoMore = std::numeric_limits<int64_t>::max();

  explicit NextUses(const TraceView& trace);

  // The expert's first use after the step that was passed last.
  int64_t NextStep(ExpertIndex expert) const {
    const auto e = static_cast<size_t>(Index(expert));
    const size_t use = cursor_[e];
    return use < first_use_[e + 1] ? steps_[use] : kNoMore;
  }

  // Moves on past `step`, which must be the one after the last.
  void Pass(int64_t step);

 private:
  TraceView trace_;
  std::vector<size_t> first_use_;  // [num_layers * num_experts + 1]
  std::vector<size_t> cursor_;     // [num_layers * num_experts]
  std::vector<int64_t> steps_;     // [uses]
};

}  // namespace expertflow
