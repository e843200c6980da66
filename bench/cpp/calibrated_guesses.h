// What a predictor might have recorded of a trace: guesses that come true as often as they say.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/prefetch_scheduler.h"
#include "core/trace.h"

namespace expertflow {

// [horizon, num_experts] as a cache takes what `predictions` say, none of them farther ahead.
inline std::vector<float> NeedOf(const std::vector<Prediction>& predictions, int32_t horizon,
                                 int32_t num_experts) {
  std::vector<float> need(static_cast<size_t>(horizon * num_experts));
  for (const Prediction& p : predictions) {
    need[static_cast<size_t>((p.distance - 1) * num_experts + p.expert)] = p.need;
  }
  return need;
}

// Two candidates for each step ahead: at every step for those behind it, and at the begin of every
// token for its first ones.
class CalibratedGuesses {
 public:
  // The trace must route to two experts or more, and be there only meanwhile.
  CalibratedGuesses(const TraceView& trace, int32_t num_distances) : num_distances_(num_distances) {
    for (int64_t step = 0; step < trace.num_steps(); ++step) {
      for (int32_t d = 1; d <= num_distances; ++d) at_layers_.Add(trace, step + d, draws_);
      if (trace.LayerOf(step) > 0) continue;
      for (int32_t d = 1; d <= num_distances; ++d) at_tokens_.Add(trace, step + d - 1, draws_);
    }
  }

  RecordedPredictions view() const {
    return {.num_distances = num_distances_,
            .num_candidates = kNumCandidates,
            .expert_ids = at_layers_.expert_ids.data(),
            .need_q16 = at_layers_.need_q16.data(),
            .first_expert_ids = at_tokens_.expert_ids.data(),
            .first_need_q16 = at_tokens_.need_q16.data()};
  }

 private:
  static constexpr int32_t kNumCandidates = 2;
  static constexpr uint32_t kNeedPercent[kNumCandidates] = {90, 45};

  struct Draws {
    uint32_t state = 5;
    uint32_t Next() { return (state = state * 1664525U + 1013904223U) >> 16; }
  };

  struct Rows {
    std::vector<uint16_t> expert_ids;  // [rows, candidates], as the next
    std::vector<uint16_t> need_q16;

    void Add(const TraceView& trace, int64_t step, Draws& draws) {
      const auto routed = trace.experts(std::min(step, trace.num_steps() - 1));
      uint16_t id = routed[0];
      for (size_t g = 0; g < kNumCandidates; ++g) {
        const bool comes_true = draws.Next() % 100 < kNeedPercent[g];
        const uint16_t before = id;
        id = routed[g];
        while (!comes_true && (std::ranges::find(routed, id) != routed.end() || id == before)) {
          id = static_cast<uint16_t>(draws.Next() % static_cast<uint32_t>(trace.num_experts));
        }
        expert_ids.push_back(id);
        need_q16.push_back(static_cast<uint16_t>(kNeedPercent[g] * 65535 / 100));
      }
    }
  };

  int32_t num_distances_;
  Draws draws_;
  Rows at_layers_;
  Rows at_tokens_;
};

}  // namespace expertflow
