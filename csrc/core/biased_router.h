#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/predictor/routing_rule.h"

namespace expertflow {

struct BiasOptions {
  float strength = 0.0f;  // of the bias, in mean ranges of the layer's scores
  int32_t keep_top = 0;   // a token's best experts that stay whatever is resident
  double budget = 0.0;    // the largest share of routes that may change
};

struct RouteCounts {
  int64_t routes = 0;  // that could have been changed: tokens * k
  int64_t changed = 0;
};

// Routes tokens to resident experts where the router hardly prefers others: lossy, fewer misses.
//
//   range  = running mean over tokens of (largest - smallest selection score), for each layer
//   credit = budget * routes - changed routes
//   swap a missing expert for a resident one while
//     score(missing) - score(resident) < strength * range  and
//     weight(missing) - weight(resident) < credit / 512    and  credit >= 1
//
// The first condition gives the top-k of scores that are raised by strength * range on resident
// experts and on the keep_top best: the cache-prior of Skliar et al., "Mixture of Cache-Conditional
// Experts for Efficient Mobile Device Inference" (2024, arXiv:2412.00099). The scores are those
// that the family selects by: the logits, or sigmoids with correction bias. The token's groups are
// chosen without the bias. Ours is the budget and the second condition: weights are shares of what
// the token's own experts weigh together, and the price settles where it spends what the budget
// gives, so that changes go where they move the least weight, across layers and tokens.
//
// Not thread-safe. Allocates nothing after construction.
class BiasedRouter {
 public:
  // `corrections` is empty, or [num_layers * experts] for sigmoid rules. Throws
  // std::invalid_argument for options out of range.
  BiasedRouter(const RoutingRule& rule, int32_t num_layers, std::vector<float> corrections,
               const BiasOptions& options);

  // Changes `expert_ids` [tokens * k], the family's own choice from `logits` [tokens * experts],
  // and returns how many it changed: a resident expert takes the place of the missing one. What is
  // fetched for one token is resident for the tokens behind it. A token whose logits are not all
  // finite is left alone and not counted. `is_resident` is [experts]. Throws std::invalid_argument
  // for other sizes, std::out_of_range for a layer or an id that the model does not have.
  int64_t Reroute(int32_t layer, std::span<const float> logits,
                  std::span<const uint8_t> is_resident, std::span<int64_t> expert_ids);

  // [num_layers], since the last reset. After every token, changed <= budget * routes in total.
  const std::vector<RouteCounts>& counts() const { return counts_; }
  void ResetCounts();

 private:
  struct Range {
    float mean = 0.0f;
    int64_t num_tokens = 0;
  };

  void Check(int32_t layer, std::span<const float> logits, std::span<const uint8_t> is_resident,
             std::span<const int64_t> expert_ids) const;
  int64_t RerouteToken(size_t layer, std::span<const float> logits, std::span<int64_t> expert_ids);
  // The range of the token's `scores_`, taken into the layer's mean, which is returned.
  float MeanRange(size_t layer);
  // Fills `places_` with those that may change, the one with the smallest score first.
  void CollectMissing(std::span<const int64_t> expert_ids);
  // Changes the ids at `places_`, and returns how many.
  int64_t Swap(std::span<const float> logits, std::span<int64_t> expert_ids, float max_score_gap,
               double credit);
  // The best resident expert that the token may take and has not; -1 if there is none.
  int64_t BestResident() const;

  RoutingRule rule_;
  BiasOptions options_;
  Router router_;
  std::vector<float> corrections_;
  std::vector<Range> ranges_;        // [num_layers]
  std::vector<RouteCounts> counts_;  // [num_layers]
  RouteCounts total_;

  std::vector<float> scores_;         // [experts] of the current token
  std::vector<uint8_t> is_resident_;  // [experts] or fetched for an earlier token of the pass
  std::vector<uint8_t> is_taken_;     // [experts] by the current token
  std::vector<size_t> places_;        // [k] indices into the token's ids
};

}  // namespace expertflow
