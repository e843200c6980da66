#include "core/miss_costs.h"

#include <cmath>
#include <cstddef>

#include "core/eviction/need_model.h"

namespace expertflow {
namespace {

constexpr double kRate = 1.0 / 256;  // of a token
// A transfer that nobody waits for still takes time of the link and a slot for too long.
constexpr double kHiddenCost = 0.03;  // transfers
// So that a layer that fetches next to nothing goes back to costing a transfer.
constexpr double kWithoutEvidence = 0.002;  // transfers a token

}  // namespace

MissCosts::MissCosts(int32_t num_layers) : layers_(static_cast<size_t>(num_layers)) {}

void MissCosts::Record(int32_t layer, double stall_us, int32_t num_fetched, double transfer_us) {
  Layer& at = layers_[static_cast<size_t>(layer)];
  at.stall += (stall_us / transfer_us - at.stall) * kRate;
  at.fetched += (num_fetched - at.fetched) * kRate;
}

int32_t MissCosts::bias(int32_t layer) const {
  const Layer& at = layers_[static_cast<size_t>(layer)];
  const double cost = (at.stall + kWithoutEvidence) / (at.fetched + kWithoutEvidence);
  return static_cast<int32_t>(
      std::lround(std::log(cost + kHiddenCost) * (1 << NeedModel::kFractionBits)));
}

}  // namespace expertflow
