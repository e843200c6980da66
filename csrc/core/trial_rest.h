#pragma once

#include <algorithm>
#include <cstdint>

namespace expertflow {

// How long to leave a decision alone: twice as long each time, but only while the machine is the
// one that it was made on. Counts layers. Pure.
class TrialRest {
 public:
  static constexpr int64_t kFirstLayers = 2048;

  void Begin(int64_t longest_layers) {
    layers_left_ = std::min(next_layers_, longest_layers);
    next_layers_ = 2 * layers_left_;
    begin_ = now_;
  }
  // The next rest is a short one again.
  void Shorten() { next_layers_ = kFirstLayers; }

  // One more layer ran, on a link of that bandwidth. Returns whether the machine has changed since
  // the rest began, which ends it.
  bool Advance(double bytes_per_second, double compute_us) {
    now_.bytes_per_second = bytes_per_second;
    now_.compute_us += (compute_us - now_.compute_us) * (now_.compute_us > 0.0 ? kRate : 1.0);
    if (layers_left_ == 0) return false;
    --layers_left_;
    const bool has_changed = Differ(now_.bytes_per_second, begin_.bytes_per_second) ||
                             Differ(now_.compute_us, begin_.compute_us);
    if (has_changed) {
      layers_left_ = 0;
      Shorten();
    }
    return has_changed;
  }
  bool is_on() const { return layers_left_ > 0; }

 private:
  static constexpr double kRate = 1.0 / 64;
  static constexpr double kChange = 1.25;

  struct Machine {
    double bytes_per_second = 0.0;
    double compute_us = 0.0;  // of a layer, exponentially weighted
  };

  static bool Differ(double a, double b) { return a > kChange * b || b > kChange * a; }

  int64_t layers_left_ = 0;
  int64_t next_layers_ = kFirstLayers;
  Machine now_;
  Machine begin_;
};

}  // namespace expertflow
