#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/predictor/learned_state.h"
#include "core/predictor/routing_rule.h"

namespace expertflow {

// The routers of a model as float32. `biases` and `corrections` are empty where the family has
// none.
struct RouterWeights {
  std::vector<float> weights;      // [layers, experts, hidden]
  std::vector<float> biases;       // [layers, experts], added to the logits
  std::vector<float> corrections;  // [layers, experts], added to sigmoid scores to choose by
};

// Foresees at an MoE layer which experts later layers will need, and learns while it runs.
//
// For layer l, distance d, target layer j = l + d, and a token with router input h at l, where
// layer kTokenStart stands for the embedding, whose distance 1 is layer 0:
//
//   score = gain * pre-gate + weights x
//   pre-gate = margin of the family's routing on W[j] h, in standard deviations
//   x = [ h / |h| ; 1/2 h'/|h'| ; 3/8 m ; 1/10 ]    h': router input of the previous token at j
//                                                   m: mean target of this token's id at j
//   need = sigmoid(slope * score + offset)          the calibrated probability
//
// and once layer j has routed, its margins are the soft targets sigmoid(margin / (0.35
// deviations)). docs/prediction.md has sources and measurements.
//
// A *pass* is one forward pass over rows (tokens) of one or more sequences, sequence by sequence.
// For each of its layers, in order: Observe, then Predict and Learn in either order; before them
// Observe and Predict of kTokenStart, or not: then nothing is learned of it in this pass. In a pass
// with several rows a sequence, all rows are predicted as of the weights before the pass and
// without the unknown h'; they are learned from in order, with h', as if they had come one by one.
// Not thread-safe.
class Predictor {
 public:
  // Throws std::invalid_argument if sizes do not fit.
  Predictor(const PredictorConfig& config, RouterWeights routers);

  // `tokens` [sequences * rows] are token ids, or empty if they are not known. The rows follow
  // those of the last pass if it had as many sequences.
  void BeginPass(int32_t num_sequences, int32_t rows_per_sequence, std::span<const int64_t> tokens);

  // Takes the router inputs [rows, hidden] of `layer`, or the embeddings, in units of their root
  // mean square as a norm would give them on. Rows that are not finite teach nothing.
  void Observe(int32_t layer, std::span<const float> hidden);

  // Scores the `max_distance` layers behind `layer`, which was observed in this pass, or all that
  // the configuration has. What is not scored teaches nothing.
  void Predict(int32_t layer, int32_t max_distance);
  void Predict(int32_t layer) { Predict(layer, config_.max_distance); }

  // Learns from how `layer`, which was observed in this pass, routes its rows.
  void Learn(int32_t layer);

  // How many distances the last Predict covered.
  int32_t num_distances() const { return num_distances_; }
  // Of the last Predict: [experts], the probability that some row needs the expert.
  std::span<const float> need(int32_t distance) const;
  // Of the last Predict: [rows, experts].
  std::span<const float> scores(int32_t distance) const;
  // The most needed experts, descending; ties go to the lower id.
  void Rank(int32_t distance, std::span<int32_t> experts) const;

  const PredictorConfig& config() const { return config_; }
  const RouterWeights& routers() const { return routers_; }
  LearnedState& state() { return state_; }
  const LearnedState& state() const { return state_; }

 private:
  // What a layer showed in the pass `pass`.
  struct Layer {
    int64_t pass = -1;
    int64_t predicted_pass = -1;
    int32_t num_distances = 0;      // that it predicted then
    std::vector<float> directions;  // [rows, hidden] of length 1, or 0 if not finite
    std::vector<float> lengths;     // [rows]
    std::vector<float> base;        // [distances, rows, experts], the pre-gates it computed
    std::vector<float> scores;      // [distances, rows, experts]
    std::vector<float> previous;    // [sequences, hidden], directions at the end of the last pass
  };

  void CheckLayer(int32_t layer, int32_t first) const;
  void CheckObserved(int32_t layer, int32_t first) const;
  Layer& At(int32_t layer) { return sources_[SourceOf(layer)]; }
  const Layer& At(int32_t layer) const { return sources_[SourceOf(layer)]; }
  std::span<const float> Direction(const Layer& layer, size_t row) const;
  std::span<const float> Previous(size_t target, size_t row, bool is_known) const;
  std::span<float> Block(std::vector<float>& values, size_t distance, size_t row) const;
  float Margins(size_t layer, const Layer& from, size_t row, std::span<float> margins);
  void PredictRow(int32_t layer, size_t distance, size_t row);
  void LearnRow(int32_t layer, size_t row);
  void SetTargets(size_t layer, size_t row);
  void FillFeatures(std::span<const float> direction, std::span<const float> previous,
                    size_t target, size_t row);
  void RememberToken(size_t layer, size_t row);
  ScoreModel Model(size_t pair);

  PredictorConfig config_;
  RouterWeights routers_;
  LearnedState state_;
  Router router_;
  size_t num_layers_, num_experts_, hidden_;
  size_t num_sequences_ = 0, rows_per_sequence_ = 0, num_rows_ = 0;
  int64_t pass_ = 0;
  std::vector<int64_t> buckets_;  // of the pass's rows; empty if unknown
  std::vector<Layer> sources_;    // of the embedding, then of each layer
  int32_t num_distances_ = 0, last_layer_ = 0;
  std::vector<float> need_;                          // [distances, experts]
  std::vector<float> features_, margins_, targets_;  // of one row
};

}  // namespace expertflow
