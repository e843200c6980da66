#include "cuda/decode.h"

#include <algorithm>
#include <array>
#include <span>
#include <stdexcept>
#include <string>

#include "cuda/device_guard.h"
#include "cuda/expert_mlp.h"
#include "cuda/weighted_sum.h"

namespace expertflow::cuda {
namespace {

constexpr auto kMaxPairs = static_cast<size_t>(ExpertMlp::kMaxPairs);

const ExpertMlp& MlpOf(const ExpertCache& cache) {
  if (cache.mlp()) return *cache.mlp();
  throw std::invalid_argument("this expert cache was made without an MLP for the decode kernels");
}

// Where each of some keys stands in a list, key by key.
class PairGroups {
 public:
  explicit PairGroups(std::span<const int64_t> routed) : routed_(routed) {
    if (routed.size() <= kMaxPairs) return;
    throw std::invalid_argument("a decode step has at most " + std::to_string(kMaxPairs) +
                                " routed experts, not " + std::to_string(routed.size()));
  }

  void Add(int64_t key, SlotId slot) {
    const size_t first = num_places_;
    for (size_t place = 0; place < routed_.size(); ++place) {
      if (routed_[place] == key) places_[num_places_++] = static_cast<int32_t>(place);
    }
    groups_[num_groups_++] = {Index(slot), {&places_[first], num_places_ - first}};
  }

  std::span<const PairGroup> groups() const { return {groups_.data(), num_groups_}; }

 private:
  std::span<const int64_t> routed_;
  std::array<int32_t, kMaxPairs> places_;
  std::array<PairGroup, kMaxPairs> groups_;
  size_t num_places_ = 0;
  size_t num_groups_ = 0;
};

ExpertMlpBatch MakeBatch(const ExpertCache& cache, const DecodeStep& step,
                         std::span<const PairGroup> groups) {
  return {.slots = cache.slot_data(SlotId{0}),
          .hidden = step.hidden,
          .num_tokens = step.num_tokens,
          .top_k = step.top_k,
          .groups = groups,
          .partial = step.partial,
          .workspace = step.workspace};
}

void SumPartials(const ExpertMlpShape& shape, const DecodeStep& step, cudaStream_t stream) {
  LaunchWeightedSum({.partial = step.partial,
                     .weights = step.weights,
                     .output = step.output,
                     .num_tokens = step.num_tokens,
                     .top_k = step.top_k,
                     .hidden = shape.hidden,
                     .dtype = shape.dtype,
                     .weights_dtype = step.weights_dtype},
                    stream);
}

}  // namespace

size_t DecodeWorkspaceBytes(const ExpertCache& cache, int32_t num_tokens, int32_t top_k) {
  return MlpOf(cache).WorkspaceBytes(num_tokens * top_k);
}

void ComputeDecodeStep(ExpertCache& cache, const DecodeStep& step, cudaStream_t stream) {
  const ExpertMlp& mlp = MlpOf(cache);
  const DeviceGuard guard(cache.device());
  const Plan* plan = cache.plan();
  const std::span<const int64_t> expert_ids = cache.routed_ids();
  if (plan == nullptr || std::ssize(expert_ids) != int64_t{step.num_tokens} * step.top_k) {
    throw std::invalid_argument("the tensors are not those that the layer was planned for");
  }
  PairGroups pairs(expert_ids);
  for (const PlanRow& row : plan->rows) pairs.Add(row.expert, row.slot);
  const auto num_hits = static_cast<size_t>(plan->num_hits);
  if (num_hits > 0) {
    mlp.Launch(MakeBatch(cache, step, pairs.groups().first(num_hits)), stream);
  }
  for (int32_t row = 0; row < plan->num_hits; ++row) cache.Release(row, stream);
  for (int32_t row = plan->num_hits; row < std::ssize(plan->rows); ++row) {
    cache.Wait(row, stream);
    mlp.Launch(MakeBatch(cache, step, pairs.groups().subspan(static_cast<size_t>(row), 1)), stream);
    cache.Release(row, stream);
  }
  SumPartials(mlp.shape(), step, stream);
}

void ComputeSlots(const ExpertCache& cache, std::span<const int64_t> slots, const DecodeStep& step,
                  cudaStream_t stream) {
  const ExpertMlp& mlp = MlpOf(cache);
  const DeviceGuard guard(cache.device());
  if (std::ssize(slots) != int64_t{step.num_tokens} * step.top_k) {
    throw std::invalid_argument("slots must name one for each token and routed expert");
  }
  PairGroups pairs(slots);
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] < 0 || slots[i] >= cache.num_slots()) {
      throw std::invalid_argument("slot " + std::to_string(slots[i]) + " does not exist");
    }
    const bool is_first = std::ranges::find(slots.first(i), slots[i]) == slots.first(i).end();
    if (is_first) pairs.Add(slots[i], SlotId{Saturated(slots[i])});
  }
  mlp.Launch(MakeBatch(cache, step, pairs.groups()), stream);
  SumPartials(mlp.shape(), step, stream);
}

}  // namespace expertflow::cuda
