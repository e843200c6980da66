#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace expertflow {

// How far below the border experts outside the token's groups are at least, in standard deviations:
// two widths of the soft border.
inline constexpr float kOutsideGroups = 0.7f;

// How a model family picks the experts of a token from its router's logits.
//
//   softmax (Mixtral, Qwen, OLMoE, gpt-oss, DeepSeek-V2): the k largest logits, since softmax keeps
//     their order; in group-limited models only within the groups with the largest maxima
//   sigmoid (DeepSeek-V3, GLM4-MoE): the k largest of sigmoid(logit) + correction bias, within the
//     groups with the largest sums of their two best
struct RoutingRule {
  int32_t num_experts = 0;
  int32_t top_k = 0;
  bool is_sigmoid = false;
  int32_t num_groups = 1;
  int32_t top_groups = 1;  // a token's experts come from this many groups

  // Throws std::invalid_argument.
  void Check() const;
};

// Turns logits into what the rule selects by.
class Router {
 public:
  explicit Router(const RoutingRule& rule);

  // `values` [experts]: logits in, selection scores out; the token's experts are the k best of
  // those that are eligible. `correction` is empty, or [experts] for sigmoid rules.
  void ToScores(std::span<float> values, std::span<const float> correction);
  // Whether an expert is in one of the groups that the last token chose.
  bool IsEligible(size_t expert) const { return is_eligible_[expert] != 0; }

  // `values` [experts]: logits in, margins out: how far each expert's selection score lies above
  // (routed) or below the border half way between the last expert that is routed and the first that
  // is not. `correction` as above. Returns the standard deviation of the selection scores over the
  // experts. Experts outside the token's groups get a negative margin, whatever their score.
  float ToMargins(std::span<float> values, std::span<const float> correction);

 private:
  void ChooseGroups(std::span<const float> scores);

  RoutingRule rule_;
  std::vector<float> group_scores_, sorted_;
  std::vector<uint8_t> is_eligible_;
};

}  // namespace expertflow
