#include "cuda/decode.h"

#include <array>
#include <span>
#include <stdexcept>

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

// The places of the routed ids, row by row of a plan.
class PairGroups {
 public:
  PairGroups(const Plan& plan, std::span<const int64_t> expert_ids) {
    if (expert_ids.size() > kMaxPairs) {
      throw std::invalid_argument("a decode step has at most " + std::to_string(kMaxPairs) +
                                  " routed experts, not " + std::to_string(expert_ids.size()));
    }
    size_t num_places = 0;
    for (const PlanRow& row : plan.rows) {
      const size_t first = num_places;
      for (size_t place = 0; place < expert_ids.size(); ++place) {
        if (expert_ids[place] == row.expert) places_[num_places++] = static_cast<int32_t>(place);
      }
      groups_[num_groups_++] = {Index(row.slot), {&places_[first], num_places - first}};
    }
  }

  std::span<const PairGroup> groups() const { return {groups_.data(), num_groups_}; }

 private:
  std::array<int32_t, kMaxPairs> places_;
  std::array<PairGroup, kMaxPairs> groups_;
  size_t num_groups_ = 0;
};

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
  const PairGroups pairs(*plan, expert_ids);
  ExpertMlpBatch batch{.slots = cache.slot_data(SlotId{0}),
                       .hidden = step.hidden,
                       .num_tokens = step.num_tokens,
                       .top_k = step.top_k,
                       .groups = pairs.groups().first(static_cast<size_t>(plan->num_hits)),
                       .partial = step.partial,
                       .workspace = step.workspace};
  if (!batch.groups.empty()) mlp.Launch(batch, stream);
  for (int32_t row = 0; row < plan->num_hits; ++row) cache.Release(row, stream);
  for (int32_t row = plan->num_hits; row < std::ssize(plan->rows); ++row) {
    cache.Wait(row, stream);
    batch.groups = pairs.groups().subspan(static_cast<size_t>(row), 1);
    mlp.Launch(batch, stream);
    cache.Release(row, stream);
  }
  LaunchWeightedSum({.partial = step.partial,
                     .weights = step.weights,
                     .output = step.output,
                     .num_tokens = step.num_tokens,
                     .top_k = step.top_k,
                     .hidden = mlp.shape().hidden,
                     .dtype = mlp.shape().dtype,
                     .weights_dtype = step.weights_dtype},
                    stream);
}

}  // namespace expertflow::cuda
