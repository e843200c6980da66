#include "core/predictor/routing_rule.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

namespace expertflow {
namespace {

struct Spread {
  float mean, deviation;
};

Spread SpreadOf(std::span<const float> values) {
  double sum = 0.0, squares = 0.0;
  for (const float value : values) sum += value;
  const double mean = sum / static_cast<double>(values.size());
  for (const float value : values) squares += (value - mean) * (value - mean);
  return {static_cast<float>(mean),
          static_cast<float>(std::sqrt(squares / static_cast<double>(values.size())))};
}

}  // namespace

void RoutingRule::Check() const {
  if (num_experts < 1 || top_k < 1 || top_k > num_experts) {
    throw std::invalid_argument("top_k " + std::to_string(top_k) + " of " +
                                std::to_string(num_experts) + " experts makes no sense");
  }
  if (num_groups < 1 || num_experts % num_groups != 0 || top_groups < 1 ||
      top_groups > num_groups || top_k > top_groups * (num_experts / num_groups)) {
    throw std::invalid_argument(std::to_string(top_groups) + " of " + std::to_string(num_groups) +
                                " groups of experts do not fit " + std::to_string(num_experts) +
                                " experts, " + std::to_string(top_k) + " for each token");
  }
}

Router::Router(const RoutingRule& rule) : rule_(rule) {
  rule.Check();
  is_eligible_.assign(static_cast<size_t>(rule.num_experts), 1);
  group_scores_.resize(static_cast<size_t>(rule.num_groups));
}

void Router::ToScores(std::span<float> values, std::span<const float> correction) {
  if (rule_.is_sigmoid) {
    for (size_t e = 0; e < values.size(); ++e) {
      values[e] = 1.0f / (1.0f + std::exp(-values[e])) + (correction.empty() ? 0 : correction[e]);
    }
  }
  if (rule_.num_groups > 1) ChooseGroups(values);
}

float Router::ToMargins(std::span<float> values, std::span<const float> correction) {
  ToScores(values, correction);
  const float deviation = SpreadOf(values).deviation;
  sorted_.clear();
  for (size_t e = 0; e < values.size(); ++e) {
    if (is_eligible_[e]) sorted_.push_back(values[e]);
  }
  const auto k = static_cast<size_t>(rule_.top_k);
  const size_t num_sorted = std::min(k + 1, sorted_.size());
  std::partial_sort(sorted_.begin(), sorted_.begin() + static_cast<std::ptrdiff_t>(num_sorted),
                    sorted_.end(), std::greater<>());
  const float last = sorted_[k - 1];
  const float border = sorted_.size() > k ? 0.5f * (last + sorted_[k]) : last - deviation;
  for (size_t e = 0; e < values.size(); ++e) {
    values[e] -= border;
    if (!is_eligible_[e]) values[e] = std::min(values[e], 0.0f) - kOutsideGroups * deviation;
  }
  return deviation;
}

void Router::ChooseGroups(std::span<const float> scores) {
  const size_t size = scores.size() / group_scores_.size();
  for (size_t group = 0; group < group_scores_.size(); ++group) {
    float best = -std::numeric_limits<float>::infinity(), second = best;
    for (const float score : scores.subspan(group * size, size)) {
      second = std::max(second, std::min(best, score));
      best = std::max(best, score);
    }
    group_scores_[group] = rule_.is_sigmoid && size > 1 ? best + second : best;
  }
  sorted_ = group_scores_;
  const auto last = sorted_.begin() + (rule_.top_groups - 1);
  std::nth_element(sorted_.begin(), last, sorted_.end(), std::greater<>());
  for (size_t e = 0; e < scores.size(); ++e) is_eligible_[e] = group_scores_[e / size] >= *last;
}

}  // namespace expertflow
