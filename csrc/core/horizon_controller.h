#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace expertflow {

// How many layers ahead to prefetch:
//
//   lead = (bytes queued + burst * expert bytes) / bandwidth
//   S    = clamp(ceil(lead / compute time of a layer) + boost, 0, S_max)
//
// All of it is measured while running. Bytes of prefetches that may be given up do not count as
// queued: there are the more of them the longer the horizon is, so on a full link it would grow for
// having grown. The burst is the 95th percentile of the experts that a layer has to fetch, at least
// 1: fetched in time or not, so that a prefetch that works does not shorten the horizon it works
// at. Looking no farther than the lead is worth more than it seems: a nearer prediction is a better
// one, and what is prefetched early holds a slot for longer.
//
// The boost is feedback, and may be negative. While layers wait for more than a small part of the
// compute time, one layer more, or one less, is tried in a duel: blocks of layers run in turn with
// and without it, and it stays if the stall falls by more than chance explains. If not, it is not
// tried again before the stall has grown. The boost falls when nothing comes late any more. Where
// not even S_max layers hide most of a transfer, S is 0: there is next to nothing to win, but a
// wrong prefetch costs as much as ever. S moves only when the lead is clearly past where S stands.
// So constant input gives a constant S. Pure: times and measurements are arguments.
class HorizonController {
 public:
  // `max_fetched`: how many experts a layer needs at most. Throws std::invalid_argument.
  HorizonController(int32_t max_horizon, int32_t max_fetched, size_t expert_bytes);

  // A layer has run: how long it computed, how long it waited for experts, part of that for
  // prefetches in flight, and how many of the experts that the next one needs had to be fetched.
  void RecordLayer(double compute_us, double stall_us, double late_stall_us, int32_t num_fetched);

  // Takes in the state of the link and returns the new horizon, 0 while the bandwidth is 0, that
  // is, not measured yet. Once after each RecordLayer.
  int32_t Update(double bytes_per_second, double queued_bytes);

  int32_t horizon() const { return horizon_; }
  double compute_us() const { return compute_us_; }  // of one layer
  int32_t burst() const;

 private:
  // Blocks of layers with and without one layer more, or less, in turn.
  struct Duel {
    int32_t step = 0;              // that is tried: 1 or -1; 0: there is no duel
    double stall_before_us = 0.0;  // of a layer; stalls come in bursts, which the duel may outlast
    int32_t layers = 0;            // of the pair of blocks that is running
    int32_t pairs = 0;
    double saved_us = 0.0;  // stall of the running pair: without minus with
    double sum_us = 0.0;    // of saved_us over the pairs
    double sum_squares = 0.0;
  };

  void UpdateBoost();
  void AdvanceDuel();
  void EndDuel(bool is_won);
  bool MayTry(int32_t step) const;

  int32_t max_horizon_;
  double expert_bytes_;
  int32_t lead_layers_ = 0;
  int32_t boost_ = 0;
  int32_t horizon_ = 0;
  int32_t layers_since_boost_ = 0;
  bool is_too_slow_ = false;  // the link
  Duel duel_;
  double last_stall_us_ = 0.0;
  int32_t next_step_ = 1;
  std::array<double, 2> stall_when_refused_us_{};  // one layer less; one more
  double compute_us_ = 0.0;                        // exponentially weighted, as the next three
  double stall_us_ = 0.0;
  double late_stall_us_ = 0.0;
  double queued_bytes_ = 0.0;
  std::vector<double> fetched_;  // [max_fetched + 1] decayed count of layers that fetched so many
  double num_layers_ = 0.0;      // sum of fetched_
};

}  // namespace expertflow
