#pragma once

#include <cstddef>
#include <optional>

#include "core/plan.h"
#include "core/prefetch_scheduler.h"

namespace expertflow {

// Measures what the prefetch scheduler must know about the layer that ran last:
//
//   compute time = time between two plans - stalls in between
//
// Only two consecutive layers of one pass tell it: between the last layer of a pass and the first
// of the next lie output layer, sampling, and whatever the user does, so there the compute time
// measured before counts once more. (A model of one MoE layer has no other, and is never measured.)
// Next to a prompt nothing is measured, as prompts compute for longer and fetch more than tokens
// do. Times are arguments, of any origin.
class LayerClock {
 public:
  // Computation waited, for a prefetch in flight if `is_late`.
  void RecordStall(double stall_us, bool is_late) {
    stall_us_ += stall_us;
    if (is_late) late_stall_us_ += stall_us;
  }
  void RecordMoved(size_t num_bytes) { moved_bytes_ += static_cast<double>(num_bytes); }

  // A token begins. How long it then took until its first layer was planned, the last time that
  // this was seen: attention and router, and what stands before the first MoE layer. 0: not yet.
  void BeginToken(double now_us) { token_us_ = now_us; }
  double first_us() const { return first_us_; }

  // A layer is planned at `now_us`; then what was measured since the plan before, if anything.
  void RecordPlan(const Plan& plan, double now_us);
  const std::optional<LayerObservation>& last() const { return last_; }

 private:
  bool is_in_tokens_ = false;  // the plan before was not a prompt's
  int32_t layer_ = 0;          // of the plan before, as the next
  double begin_us_ = 0.0;
  double compute_us_ = 0.0;         // measured last; 0: not yet
  std::optional<double> token_us_;  // that begun since the plan before
  double first_us_ = 0.0;
  double stall_us_ = 0.0;  // since the plan before, as the next two
  double late_stall_us_ = 0.0;
  double moved_bytes_ = 0.0;
  std::optional<LayerObservation> last_;
};

}  // namespace expertflow
