#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/trace.h"

namespace expertflow {

// Remembers how past tokens were routed, and lets those that went as the running one does vote on
// where it goes next.
//
// Every lag (1: the token before, ...) has a similarity: how many experts of a step are those of
// the step that many tokens earlier, summed over all steps, an older step counting 0.9 of the next.
// So it goes on over the end of a token: layer 0 of the next one is voted on by what followed
// tokens like the last. A vote has the weight exp(sharpness * similarity / top-k), as in attention.
class RoutingMemory {
 public:
  // Keeps a view of the trace.
  explicit RoutingMemory(const TraceView& trace);

  // `step`, the one after the last, is known now.
  void Observe(int64_t step);

  // Sets `shares` [num_experts] to the share of the votes that each expert has for `distance` steps
  // after the last observed one; `prior` [num_experts] has the weight of a fifth of the best vote.
  void Vote(int32_t distance, float sharpness, std::span<const float> prior,
            std::span<float> shares) const;

 private:
  struct Past {
    float similarity;
    int32_t lag;
  };

  void AddOverlap(int64_t step);
  void FindNearest();

  TraceView trace_;
  int64_t step_ = -1;
  std::vector<std::vector<int32_t>> tokens_of_;  // [num_layers * num_experts] that used it
  std::vector<float> similarities_;              // by lag - 1
  std::vector<Past> nearest_;                    // the most similar first
};

}  // namespace expertflow
