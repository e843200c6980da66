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
  int32_t top_k = 1;
  size_t expert_bytes = 0;
};

// What happened since the last call; all of it measured.
struct LayerObservation {
  double compute_us = 0.0;        // of the layer that ran last, without stalls
  double stall_us = 0.0;          // waits for experts
  double late_stall_us = 0.0;     // part of it: waits for prefetches in flight
  int32_t num_fetched = 0;        // experts that the layer planned now had to fetch, in time or not
  int32_t num_prefetch_used = 0;  // part of them: a prefetch brought it, or is bringing it
  double wasted_bytes = 0.0;      // prefetched and evicted or dropped without a use
  double bytes_per_second = 0.0;  // of the link; 0: not measured yet
  double queued_bytes = 0.0;
};

// Decides which predicted experts to prefetch. For each planned layer:
//
//   horizon = BeginLayer(observation)
//   for each prediction up to `horizon` layers ahead, nearer layers first, the more probable first:
//     if the expert is not resident and Admits(prediction, bytes ahead of it), post it
//
// An expert is admitted if the part of its transfer that fits into the idle time of the link before
// its layer is worth what it costs should it be wrong:
//
//   need * hidden >= (1 - need) * price * transfer
//       transfer = expert bytes / bandwidth
//       hidden   = min(transfer, distance * compute time of a layer - bytes ahead / bandwidth)
//
// A wrong transfer takes the link from others and a slot from an expert. What that costs is not
// known beforehand, so the price follows the waste: it settles where the link time of wasted
// prefetches is kWasteShare of the time that prefetches hid. If it climbs to kMaxPrice, prefetching
// does not pay: the horizon is 0 for a while, which is twice as long each time. Pure: times are
// arguments.
class PrefetchScheduler {
 public:
  static constexpr double kWasteShare = 0.4;
  static constexpr double kMinPrice = 1.0 / 32;
  static constexpr double kMaxPrice = 4.0;

  explicit PrefetchScheduler(const PrefetchConfig& config);

  // Returns how many layers ahead to predict and prefetch now.
  int32_t BeginLayer(const LayerObservation& layer);

  // `bytes_ahead`: queued prefetches that are needed no later than this one.
  bool Admits(const Prediction& prediction, double bytes_ahead) const;

  int32_t horizon() const { return is_paused() ? 0 : horizon_.horizon(); }
  double price() const { return price_; }

 private:
  bool is_paused() const { return layers_paused_ > 0; }
  void UpdatePrice(const LayerObservation& layer);
  void PauseIfTooDear();

  double expert_bytes_;
  HorizonController horizon_;
  double transfer_us_ = 0.0;  // of one expert; 0: the bandwidth is not known yet
  double hidden_us_ = 0.0;    // decayed: transfer time that prefetches hid
  double wasted_us_ = 0.0;    // decayed: transfer time that prefetches wasted
  double price_ = 1.0;
  int64_t layers_paused_ = 0;  // that are still to come
  int64_t next_pause_layers_;
};

}  // namespace expertflow
