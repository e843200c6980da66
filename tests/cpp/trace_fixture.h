// Small traces: written out, and drawn from a skewed distribution.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/trace.h"

namespace expertflow {

// Owns what a TraceView shows.
struct TestTrace {
  int32_t num_layers;
  int32_t top_k;
  int32_t num_experts;
  std::vector<uint16_t> expert_ids;  // [tokens, layers, top_k]
  int32_t num_distances = 0;
  int32_t num_candidates = 0;
  std::vector<uint16_t> predicted_ids = {};
  std::vector<uint16_t> need_q16 = {};
  std::vector<uint16_t> first_predicted_ids = {};
  std::vector<uint16_t> first_need_q16 = {};

  TraceView view() const {
    const auto per_token = static_cast<size_t>(num_layers * top_k);
    return {.num_tokens = static_cast<int64_t>(expert_ids.size() / per_token),
            .num_layers = num_layers,
            .top_k = top_k,
            .num_experts = num_experts,
            .expert_ids = expert_ids.data(),
            .predictions = {.num_distances = num_distances,
                            .num_candidates = num_candidates,
                            .expert_ids = predicted_ids.data(),
                            .need_q16 = need_q16.data(),
                            .first_expert_ids =
                                first_predicted_ids.empty() ? nullptr : first_predicted_ids.data(),
                            .first_need_q16 = first_need_q16.data()}};
  }
};

// Distinct experts; every expert is kept from the token before with probability 1/2, and new ones
// are mostly among the first quarter of the layer's experts.
inline TestTrace SkewedTrace(int64_t num_tokens, int32_t num_layers, int32_t top_k,
                             int32_t num_experts, uint32_t seed) {
  TestTrace trace{num_layers, top_k, num_experts, {}};
  std::vector<uint16_t>& ids = trace.expert_ids;
  uint32_t state = seed;
  const auto draw = [&state] { return (state = state * 1664525U + 1013904223U) >> 16; };
  const auto per_token = static_cast<size_t>(num_layers * top_k);
  for (int64_t step = 0; step < num_tokens * num_layers; ++step) {
    const size_t first = ids.size();
    const auto add = [&](uint32_t id) {
      for (size_t i = first; i < ids.size(); ++i) {
        if (ids[i] == id) return;
      }
      ids.push_back(static_cast<uint16_t>(id));
    };
    for (size_t k = 0; first >= per_token && k < static_cast<size_t>(top_k); ++k) {
      if (draw() % 2 == 0) add(ids[first - per_token + k]);
    }
    while (ids.size() < first + static_cast<size_t>(top_k)) {
      const auto range = static_cast<uint32_t>(draw() % 4 == 0 ? num_experts : num_experts / 4);
      add(draw() % range);
    }
  }
  return trace;
}

}  // namespace expertflow
