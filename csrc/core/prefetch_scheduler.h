#pragma once

#include <cstddef>
#include <cstdint>

#include "core/horizon_controller.h"

namespace expertflow {

// An expert that the layer `distance` steps ahead may need, with the probability that it does.
struct Prediction {
  int32_t distance;
  int32_t expert;
  float need;
};

struct PrefetchConfig {
  int32_t max_horizon = 8;
  int32_t max_fetched = 1;  // experts that a layer needs at most
  size_t expert_bytes = 0;
};

// What happened since the last call; all of it measured. Counts of prefetched experts are those of
// PrefetchLedger.
struct LayerObservation {
  double compute_us = 0.0;     // of the layer that ran last, without stalls
  double stall_us = 0.0;       // waits for experts
  double late_stall_us = 0.0;  // part of it: waits for prefetches in flight
  int32_t num_fetched = 0;     // experts that the layer planned now had to fetch, in time or not
  int32_t num_prefetch_used = 0;
  int32_t num_prefetch_wasted = 0;
  int32_t num_prefetch_regretted = 0;
  double moved_bytes = 0.0;       // prefetched and demanded
  double bytes_per_second = 0.0;  // of the link; 0: not measured yet
  double queued_bytes = 0.0;      // that stay so: PrefetchBacklog::settled_bytes
};

// Decides which predicted experts to prefetch. For each planned layer:
//
//   horizon = BeginLayer(observation)
//   predict up to `horizon` layers ahead: nearer layers first, the more probable first
//   for each that is resident and Expects(prediction): protect it in the slot table
//   for each that is not and Admits(prediction, its bytes, bytes ahead of it): post it, if it is
//   not
//     posted already; give up those that were posted and are not admitted (PrefetchBacklog)
//
// An expert is admitted if the part of its transfer that fits into the idle time of the link before
// its layer is worth what it costs should it be wrong:
//
//   need * hidden >= (1 - need) * price * transfer
//       transfer = expert bytes / bandwidth
//       hidden   = min(transfer, distance * compute time of a layer - bytes ahead / bandwidth)
//
// What a wrong transfer costs is not known beforehand, so the price follows the balance of those
// that were made, in transfers, over the last tokens:
//
//   cost = 2 (wasted * rho^3 + regretted * exposed) + margin
//       rho       = share of the time in which the link is busy: on an idle one a wrong transfer is
//                   in nobody's way, on a full one it delays more than itself
//       regretted = those wasted ones whose victim was missed meanwhile; its return costs another
//                   expert its slot, so it counts twice
//       exposed   = what a fetch stalls on average, in transfers: next to nothing where prefetch
//                   hides nearly all, the victim's return too
//       margin    = kMargin of the stall, in transfers: so little gain is not worth what this
//                   balance does not see, least of all while the price is still being found
//   gain = used - late stall / transfer
//
// The exponent and the factors are fits: the simulator's traces and profiles, bench/paper/.
// It settles where the cost is kCostShare of the gain: what the last prefetches cost is over twice
// the average. This balance sees too much in a small cache, where every prefetch is regretted, and
// too little on a full link, so the price has an upper limit, and whether prefetching pays at all
// is for PrefetchTrial to find out. That costs nothing, so the first price is a low one: a high one
// would have to fall first, which takes longer than a short run. Pure: times are arguments.
class PrefetchScheduler {
 public:
  static constexpr double kCostShare = 0.4;
  static constexpr double kMargin = 0.01;
  // A copy beside computation lengthens it, on an H200 by 3.5 % of what the copy takes.
  static constexpr double kMinPrice = 1.0 / 32;
  static constexpr double kFirstPrice = 0.25;
  static constexpr double kMaxPrice = 4.0;

  explicit PrefetchScheduler(const PrefetchConfig& config);

  // Returns how many layers ahead to predict and prefetch now.
  int32_t BeginLayer(const LayerObservation& layer);

  // A token begins whose first layer is planned after `compute_us`, mostly a part of a layer: what
  // is admitted until the next BeginLayer has that much less time. Learns nothing. Returns the
  // horizon.
  int32_t BeginToken(double compute_us);

  // Whether the expert, which is resident, should stay until its layer.
  bool Expects(const Prediction& prediction) const {
    return static_cast<double>(prediction.need) >= least_need_;
  }

  // `num_bytes`: of the expert, that are not transferred yet; `bytes_ahead`: of prefetches that are
  // needed no later than this one.
  bool Admits(const Prediction& prediction, size_t num_bytes, size_t bytes_ahead) const;

  // Whether transfers of `num_bytes` fit into the compute time before the layer that is `distance`
  // ahead.
  bool HasTimeFor(size_t num_bytes, int32_t distance) const;

  int32_t horizon() const { return horizon_.horizon(); }
  double price() const { return price_; }
  double transfer_us() const { return transfer_us_; }  // of one expert; 0: not measured yet

 private:
  double TransferUs(size_t num_bytes) const {
    return static_cast<double>(num_bytes) / expert_bytes_ * transfer_us_;
  }
  double ComputeUntil(int32_t distance) const {
    return distance * horizon_.compute_us() - missing_us_;
  }
  void Record(const LayerObservation& layer);
  void UpdatePrice();

  // Sums over layers, the older ones decayed.
  struct Balance {
    double gain = 0.0;       // transfers that prefetches hid
    double wasted = 0.0;     // transfers
    double regretted = 0.0;  // evictions
    double fetched = 0.0;    // experts, in time or not
    double stall = 0.0;      // transfers
    double busy_us = 0.0;    // of the link
    double elapsed_us = 0.0;
  };

  double expert_bytes_;
  HorizonController horizon_;
  Balance balance_;
  double transfer_us_ = 0.0;  // of one expert; 0: the bandwidth is not known yet
  double missing_us_ = 0.0;   // to `distance` whole layers, where a token begins
  double price_ = kFirstPrice;
  double least_need_ = kFirstPrice / (1.0 + kFirstPrice);  // that is worth the price
};

}  // namespace expertflow
