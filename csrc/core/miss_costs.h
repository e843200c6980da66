#pragma once

#include <cstdint>
#include <vector>

namespace expertflow {

// What a missing expert costs, layer by layer, while prefetching hides a part of the transfers:
// from nothing, where predictions come in time, to a whole transfer, where nothing foresees the
// layer, as with the first ones of a token.
//
// An expert that is not resident costs (chance that it is needed) * (stall per fetch of its layer).
// Eviction by predicted need orders by the logarithm of the first factor, so the second is a bias:
//
//   bias = ln(stall / (fetches * transfer time) + what a hidden transfer costs)    in logits
//
// That is the principle of cost-aware caching (Young 1994; Cao and Irani 1997, GreedyDual-Size):
// keep what is dear to bring back, and the slots of what a prefetch brings for nothing are for it.
// Pure.
class MissCosts {
 public:
  explicit MissCosts(int32_t num_layers);

  // `layer` had to fetch `num_fetched` experts, in time or not, and waited for them.
  void Record(int32_t layer, double stall_us, int32_t num_fetched, double transfer_us);

  // In units of 1 / 2^NeedModel::kFractionBits, at most about 0.
  int32_t bias(int32_t layer) const;

 private:
  struct Layer {
    double stall = 1.0;    // transfers a token waits for, exponentially weighted
    double fetched = 1.0;  // experts
  };
  std::vector<Layer> layers_;
};

}  // namespace expertflow
