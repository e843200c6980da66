#include "core/layer_clock.h"

#include <algorithm>

namespace expertflow {

void LayerClock::RecordPlan(const Plan& plan, double now_us) {
  const bool is_token = is_in_tokens_ && !plan.streaming;
  if (is_token && plan.layer == layer_ + 1) {
    compute_us_ = std::max(now_us - begin_us_ - stall_us_, 0.0);
  }
  if (token_us_ && plan.layer == 0 && !plan.streaming) {
    first_us_ = std::max(now_us - *token_us_, 0.0);
  }
  token_us_.reset();
  last_.reset();
  if (is_token && compute_us_ > 0.0) {
    last_ = {.compute_us = compute_us_,
             .stall_us = stall_us_,
             .late_stall_us = late_stall_us_,
             .moved_bytes = moved_bytes_};
  }
  is_in_tokens_ = !plan.streaming;
  layer_ = plan.layer;
  begin_us_ = now_us;
  stall_us_ = late_stall_us_ = moved_bytes_ = 0.0;
}

}  // namespace expertflow
