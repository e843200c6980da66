#include "core/biased_router.h"

#include <algorithm>
#include <cmath>
#include <ranges>
#include <stdexcept>
#include <string>
#include <utility>

namespace expertflow {
namespace {

// Routes that may still change when a swap may move all of the token's weight. More spends the
// budget on smaller gaps, and starts later (docs/cache-aware-routing.md).
constexpr double kCreditOfWholeWeight = 512.0;
constexpr float kSlowestUpdate = 0.01f;  // of the mean range, so that it follows the text

}  // namespace

BiasedRouter::BiasedRouter(const RoutingRule& rule, int32_t num_layers,
                           std::vector<float> corrections, const BiasOptions& options)
    : rule_(rule), options_(options), router_(rule), corrections_(std::move(corrections)) {
  if (num_layers < 1) throw std::invalid_argument("a model has at least one layer");
  if (!(options.strength >= 0.0f) || !std::isfinite(options.strength)) {
    throw std::invalid_argument("the strength of the bias must be a number of at least 0");
  }
  if (options.keep_top < 0) throw std::invalid_argument("keep_top must be at least 0");
  if (!(options.budget >= 0.0 && options.budget <= 1.0)) {
    throw std::invalid_argument("the budget is a share of routes, from 0 to 1");
  }
  const auto num_experts = static_cast<size_t>(rule.num_experts);
  const auto size = static_cast<size_t>(num_layers);
  if (!corrections_.empty() && corrections_.size() != size * num_experts) {
    throw std::invalid_argument("corrections must be empty or [layers, experts]");
  }
  ranges_.resize(size);
  counts_.resize(size);
  scores_.resize(num_experts);
  is_resident_.resize(num_experts);
  is_taken_.resize(num_experts);
  places_.reserve(static_cast<size_t>(rule.top_k));
}

int64_t BiasedRouter::Reroute(int32_t layer, std::span<const float> logits,
                              std::span<const uint8_t> is_resident, std::span<int64_t> expert_ids) {
  Check(layer, logits, is_resident, expert_ids);
  std::ranges::copy(is_resident, is_resident_.begin());
  const auto top_k = static_cast<size_t>(rule_.top_k);
  const size_t num_tokens = expert_ids.size() / top_k;
  int64_t num_changed = 0;
  for (size_t token = 0; token < num_tokens; ++token) {
    const std::span<int64_t> ids = expert_ids.subspan(token * top_k, top_k);
    num_changed += RerouteToken(static_cast<size_t>(layer),
                                logits.subspan(token * scores_.size(), scores_.size()), ids);
    for (const int64_t expert : ids) is_resident_[static_cast<size_t>(expert)] = 1;
  }
  return num_changed;
}

void BiasedRouter::ResetCounts() {
  std::ranges::fill(counts_, RouteCounts{});
  total_ = {};
}

void BiasedRouter::Check(int32_t layer, std::span<const float> logits,
                         std::span<const uint8_t> is_resident,
                         std::span<const int64_t> expert_ids) const {
  const size_t num_experts = scores_.size();
  const auto top_k = static_cast<size_t>(rule_.top_k);
  if (layer < 0 || static_cast<size_t>(layer) >= counts_.size()) {
    throw std::out_of_range("the model has no MoE layer " + std::to_string(layer));
  }
  if (is_resident.size() != num_experts || expert_ids.size() % top_k != 0 ||
      logits.size() != expert_ids.size() / top_k * num_experts) {
    throw std::invalid_argument("logits must be [tokens, " + std::to_string(num_experts) +
                                "], expert ids [tokens, " + std::to_string(top_k) + "]");
  }
  for (const int64_t expert : expert_ids) {
    if (expert < 0 || expert >= static_cast<int64_t>(num_experts)) {
      throw std::out_of_range("there is no expert " + std::to_string(expert) + " of MoE layer " +
                              std::to_string(layer));
    }
  }
}

int64_t BiasedRouter::RerouteToken(size_t layer, std::span<const float> logits,
                                   std::span<int64_t> expert_ids) {
  if (!std::ranges::all_of(logits, [](float x) { return std::isfinite(x); })) return 0;
  std::ranges::copy(logits, scores_.begin());
  const std::span<const float> corrections(corrections_);
  router_.ToScores(scores_, corrections.empty()
                                ? corrections
                                : corrections.subspan(layer * scores_.size(), scores_.size()));
  RouteCounts& counts = counts_[layer];
  counts.routes += rule_.top_k;
  total_.routes += rule_.top_k;
  const double credit =
      options_.budget * static_cast<double>(total_.routes) - static_cast<double>(total_.changed);
  const float max_score_gap = options_.strength * MeanRange(layer);
  if (max_score_gap <= 0.0f) return 0;  // else rounding could decide between equals
  CollectMissing(expert_ids);
  const int64_t num_changed = Swap(logits, expert_ids, max_score_gap, credit);
  counts.changed += num_changed;
  total_.changed += num_changed;
  return num_changed;
}

int64_t BiasedRouter::Swap(std::span<const float> logits, std::span<int64_t> expert_ids,
                           float max_score_gap, double credit) {
  const auto logit = [&](int64_t expert) { return logits[static_cast<size_t>(expert)]; };
  const float largest = std::ranges::max(expert_ids | std::views::transform(logit));
  const auto weight = [&](int64_t expert) {
    const float x = logit(expert);
    return rule_.is_sigmoid ? 1.0f / (1.0f + std::exp(-x)) : std::exp(x - largest);
  };
  float total_weight = 0.0f;
  for (const int64_t expert : expert_ids) total_weight += weight(expert);
  const float max_weight_gap = total_weight * static_cast<float>(credit / kCreditOfWholeWeight);
  int64_t num_changed = 0;
  for (const size_t place : places_) {
    const int64_t best = BestResident();
    if (best < 0 || static_cast<double>(num_changed + 1) > credit) break;
    int64_t& expert = expert_ids[place];
    const float score_gap =
        scores_[static_cast<size_t>(expert)] - scores_[static_cast<size_t>(best)];
    if (score_gap >= max_score_gap || weight(expert) - weight(best) >= max_weight_gap) break;
    expert = best;
    is_taken_[static_cast<size_t>(best)] = 1;
    ++num_changed;
  }
  return num_changed;
}

float BiasedRouter::MeanRange(size_t layer) {
  const auto [smallest, largest] = std::ranges::minmax(scores_);
  Range& range = ranges_[layer];
  ++range.num_tokens;
  const float rate = std::max(kSlowestUpdate, 1.0f / static_cast<float>(range.num_tokens));
  range.mean += rate * ((largest - smallest) - range.mean);
  return range.mean;
}

void BiasedRouter::CollectMissing(std::span<const int64_t> expert_ids) {
  const auto score = [&](size_t place) { return scores_[static_cast<size_t>(expert_ids[place])]; };
  std::ranges::fill(is_taken_, uint8_t{0});
  places_.clear();
  for (size_t place = 0; place < expert_ids.size(); ++place) {
    is_taken_[static_cast<size_t>(expert_ids[place])] = 1;
    places_.push_back(place);
  }
  // Of equal scores the later place goes first: the router preferred the earlier one.
  std::ranges::sort(places_, [&](size_t a, size_t b) {
    return score(a) != score(b) ? score(a) < score(b) : a > b;
  });
  const auto num_kept = std::min(places_.size(), static_cast<size_t>(options_.keep_top));
  places_.resize(places_.size() - num_kept);
  std::erase_if(places_, [&](size_t place) {
    return is_resident_[static_cast<size_t>(expert_ids[place])] != 0;
  });
}

int64_t BiasedRouter::BestResident() const {
  int64_t best = -1;
  for (size_t e = 0; e < scores_.size(); ++e) {
    if (!is_resident_[e] || is_taken_[e] || !router_.IsEligible(e)) continue;
    if (best < 0 || scores_[e] > scores_[static_cast<size_t>(best)]) best = static_cast<int64_t>(e);
  }
  return best;
}

}  // namespace expertflow
