#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/ids.h"

namespace expertflow {

// What a predictor foresaw at every layer of every token, in a trace that recorded it.
struct RecordedPredictions {
  int32_t num_distances = 0;  // of 1, 2, ... layers ahead; 0: nothing was recorded
  int32_t num_candidates = 0;
  const uint16_t* expert_ids = nullptr;  // [tokens, layers, distances, candidates]
  const uint16_t* need_q16 = nullptr;    // the same shape: probability of need * 65535
  // What it foresaw of the first layers once the token's id was known, [tokens, distances,
  // candidates], distance 1 being layer 0. nullptr: this was not recorded.
  const uint16_t* first_expert_ids = nullptr;
  const uint16_t* first_need_q16 = nullptr;
};

// Recorded routing, one token after the other: a view, the caller keeps the arrays. A step is one
// layer of one token, and steps are numbered token * num_layers + layer.
struct TraceView {
  int64_t num_tokens;
  int32_t num_layers;
  int32_t top_k;
  int32_t num_experts;         // per layer
  const uint16_t* expert_ids;  // [tokens, layers, top_k]
  RecordedPredictions predictions;

  int64_t num_steps() const { return num_tokens * num_layers; }
  int64_t TokenOf(int64_t step) const { return step / num_layers; }
  int32_t LayerOf(int64_t step) const { return static_cast<int32_t>(step % num_layers); }

  std::span<const uint16_t> experts(int64_t step) const {
    const auto k = static_cast<size_t>(top_k);
    return {expert_ids + static_cast<size_t>(step) * k, k};
  }
  ExpertIndex IndexOf(int64_t step, uint16_t expert) const {
    return static_cast<ExpertIndex>(LayerOf(step) * num_experts + expert);
  }
};

// Throws std::invalid_argument if a size is not positive or an expert id, also a predicted one, is
// not below `num_experts`; the message names token, layer and position.
void CheckTrace(const TraceView& trace);

}  // namespace expertflow
