#include "core/simulation/next_uses.h"

#include <numeric>

namespace expertflow {

NextUses::NextUses(const TraceView& trace) : trace_(trace) {
  const auto num_experts =
      static_cast<size_t>(trace.num_layers) * static_cast<size_t>(trace.num_experts);
  first_use_.assign(num_experts + 1, 0);
  for (int64_t step = 0; step < trace.num_steps(); ++step) {
    for (const uint16_t expert : trace.experts(step)) {
      ++first_use_[static_cast<size_t>(Index(trace.IndexOf(step, expert))) + 1];
    }
  }
  std::partial_sum(first_use_.begin(), first_use_.end(), first_use_.begin());
  cursor_.assign(first_use_.begin(), first_use_.end() - 1);
  steps_.resize(first_use_.back());
  for (int64_t step = 0; step < trace.num_steps(); ++step) {
    for (const uint16_t expert : trace.experts(step)) {
      steps_[cursor_[static_cast<size_t>(Index(trace.IndexOf(step, expert)))]++] = step;
    }
  }
  cursor_.assign(first_use_.begin(), first_use_.end() - 1);
}

void NextUses::Pass(int64_t step) {
  for (const uint16_t expert : trace_.experts(step)) {
    ++cursor_[static_cast<size_t>(Index(trace_.IndexOf(step, expert)))];
  }
}

}  // namespace expertflow
