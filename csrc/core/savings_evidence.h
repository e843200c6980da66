#pragma once

#include <algorithm>
#include <cmath>

namespace expertflow {

// What one of two ways to do the same has saved, over blocks of work that both did; the last
// thousand blocks or so count. Pure.
class SavingsEvidence {
 public:
  void Record(double saved_us) {
    const auto add = [](double& sum, double value) { sum = sum * kKeep + value; };
    add(num_blocks_, 1.0);
    add(saved_us_, saved_us);
    add(squares_, saved_us * saved_us);
  }

  // Whether more was saved than so many standard errors. Not before kFewestBlocks.
  bool IsAbove(double errors) const {
    const double variance = squares_ - saved_us_ * saved_us_ / std::max(num_blocks_, 1.0);
    const double error_us = std::sqrt(std::max(variance, 0.0));  // of the sum
    return has_enough() && saved_us_ > errors * error_us;
  }
  bool has_enough() const { return num_blocks_ > kFewestBlocks - 0.5; }  // they decay a little

 private:
  static constexpr double kKeep = 1.0 - 1.0 / 1024;
  static constexpr double kFewestBlocks = 4.0;

  double num_blocks_ = 0.0;  // exponentially decayed sums, as the next two
  double saved_us_ = 0.0;
  double squares_ = 0.0;
};

}  // namespace expertflow
