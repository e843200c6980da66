// Made-up routing for the planner benchmarks: expert ids [token][layer][top_k].
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <span>
#include <vector>

namespace expertflow {

struct RoutesShape {
  int32_t num_layers;
  int32_t num_experts;
  int32_t top_k;
  int32_t num_tokens;
};

using Routes = std::vector<int64_t>;

// Markov and skewed: a token keeps each expert of the token before with probability `stickiness`,
// and draws the others from a Zipf distribution over the layer's own order of experts.
inline Routes SkewedRoutes(const RoutesShape& shape, double zipf_exponent, double stickiness) {
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> uniform;
  std::vector<double> weights(static_cast<size_t>(shape.num_experts));
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i] = std::pow(static_cast<double>(i + 1), -zipf_exponent);
  }
  std::discrete_distribution<size_t> zipf(weights.begin(), weights.end());
  const auto num_layers = static_cast<size_t>(shape.num_layers);
  const auto top_k = static_cast<size_t>(shape.top_k);
  std::vector<std::vector<int64_t>> order(num_layers, std::vector<int64_t>(weights.size()));
  for (auto& of_layer : order) {
    std::iota(of_layer.begin(), of_layer.end(), 0);
    std::shuffle(of_layer.begin(), of_layer.end(), random);
  }
  Routes routes;
  const size_t per_token = num_layers * top_k;
  for (int32_t token = 0; token < shape.num_tokens; ++token) {
    for (size_t layer = 0; layer < num_layers; ++layer) {
      const size_t first = routes.size();
      for (size_t k = 0; token > 0 && k < top_k; ++k) {
        if (uniform(random) < stickiness) routes.push_back(routes[first - per_token + k]);
      }
      while (routes.size() < first + top_k) {
        const int64_t id = order[layer][zipf(random)];
        const auto chosen = std::span(routes).subspan(first);
        if (std::ranges::find(chosen, id) == chosen.end()) routes.push_back(id);
      }
    }
  }
  return routes;
}

// The worst case: walks through the experts of a layer in a circle, so that every one of them
// misses.
inline Routes CircularRoutes(const RoutesShape& shape) {
  Routes routes;
  for (int32_t token = 0; token < shape.num_tokens; ++token) {
    for (int32_t layer = 0; layer < shape.num_layers; ++layer) {
      for (int32_t k = 0; k < shape.top_k; ++k) {
        routes.push_back((token * shape.top_k + k) % shape.num_experts);
      }
    }
  }
  return routes;
}

}  // namespace expertflow
