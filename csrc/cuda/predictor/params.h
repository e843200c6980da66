#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/host_device.h"
#include "core/ids.h"
#include "core/predictor/learned_state.h"

// What the predictor's kernels work on. L layers, E experts, H hidden size, N features; docs and
// sources of the arithmetic are in core/predictor/predictor.h.

namespace expertflow::predictor {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// A thread of a prediction has so many parts of rows under way, each of so many copies of 16 bytes:
// 128 KB in all blocks of a multiprocessor, where HBM delivers about 40 KB in its latency.
constexpr int kPredictStages = 2;
constexpr int kPredictLoads = 4;
constexpr int kPredictBlocksPerMultiprocessor = 4;
// One of an update has one part under way.
constexpr int kLearnLoads = 8;
constexpr int kLearnBlocksPerMultiprocessor = 4;

constexpr int kMaxDistance = 8;
constexpr int kMaxExperts = kThreads;  // the threads of a block take an expert each

// What a layer showed of the token of a pass.
struct LayerFacts {
  float length;      // of its router input; 0: not finite, or 0
  float rest_power;  // squared length of `rest`
  int32_t bucket;    // of the token id; -1: not known
};

// Arrays in device memory, one row (token) a pass.
struct View {
  RoutingRule rule;
  int32_t num_layers;
  int32_t hidden;
  int32_t max_distance;
  int32_t num_features;
  int32_t num_buckets;

  const void* routers;       // [L, E, H]
  const float* biases;       // [L, E] or nullptr
  const float* corrections;  // [L, E] or nullptr

  // As in LearnedState.
  float* weights;
  ScoreScalars* scalars;
  NeedCalibration* calibrations;
  float* token_means;
  float* token_counts;
  float* deviations;
  float* num_tokens;

  // For the update, from the prediction of the same pass. `rest` is what follows h/|h| in the
  // features of a pair whose target the layer is: it changes while others still read it.
  LayerFacts* facts;  // [1 + L] by source
  float* directions;  // [1 + L, H]
  float* rest;        // [L, N - H]
  float* margins;     // [L, E]
  float* targets;     // [L, E]
  float* base;        // [1 + L, max_distance, E]
  float* scores;      // [1 + L, max_distance, E]
  float* schedules;   // [1 + L, max_distance]

  float* previous;  // [L, H] directions of the pass before

  // Of one launch: sums over parts of rows, squared lengths of the routers' parts of h, and how
  // many blocks are done with a distance.
  float* partial;     // [max_distance + 1, max_parts, E]
  float* powers;      // [max_distance + 1, max_parts]
  uint32_t* tickets;  // [max_distance + 1]
  int32_t max_parts;

  float* need;               // [max_distance, E]
  int32_t* prefetch_ids;     // [max_distance, list_size]
  int32_t* prefetch_counts;  // [max_distance]
};

// Of experts, one for each warp of a block.
EXPERTFLOW_HD inline int32_t NumGroups(const View& view) {
  return (view.rule.num_experts + kWarps - 1) / kWarps;
}

// Into how many parts rows are cut, each of at most so many chunks of 16 bytes.
struct RowSplit {
  int32_t num_parts;
  int32_t part_chunks;
};

// The parts of a prediction. Those of the weights belong to h or to the other features, never to
// both, so that sums over parts can be divided by the length of h.
struct PredictSplit {
  RowSplit routers;
  RowSplit directions;
  RowSplit rest;

  // Of one expert, the routers' first. The layer's own routing, distance 0, has no weights.
  EXPERTFLOW_HD int32_t NumParts(int32_t distance) const {
    return routers.num_parts + (distance > 0 ? directions.num_parts + rest.num_parts : 0);
  }
};

struct PredictParams {
  View view;
  PredictSplit split;
  int32_t layer;
  int32_t num_distances;
  int32_t first_pair;
  const void* hidden;  // [H], of `hidden_dtype`
  DType hidden_dtype;
  const int64_t* token;       // or nullptr
  const SlotId* expert_slot;  // [L * E] or nullptr
  float min_need;
  int32_t list_size;
  float* host_need;               // [max_distance, E] mapped, or nullptr
  volatile uint64_t* host_words;  // [max_distance]
  uint64_t sequence;

  // Of the layer's own routing, which the begin of a token has not.
  EXPERTFLOW_HD int32_t NumOwnParts() const { return layer < 0 ? 0 : split.NumParts(0); }
};

struct LearnParams {
  View view;
  RowSplit split;  // of the weights
  int32_t layer;
  int32_t num_pairs;
  int32_t distances[kMaxDistance];
  int32_t pairs[kMaxDistance];
};

}  // namespace expertflow::predictor
