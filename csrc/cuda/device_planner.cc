#include "cuda/device_planner.h"

#include <cstddef>
#include <stdexcept>
#include <string>

#include "core/eviction/decayed_frequency.h"
#include "cuda/cuda_error.h"
#include "cuda/planner_kernel.h"

namespace expertflow {
namespace {

void Copy(void* to, const void* from, size_t num_bytes) {
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
  EXPERTFLOW_CUDA_CHECK(cudaMemcpy(to, from, num_bytes, cudaMemcpyDefault));
  EXPERTFLOW_CUDA_CHECK(cudaDeviceSynchronize());
}

}  // namespace

DevicePlanner::DevicePlanner(int32_t num_layers, int32_t num_experts, int32_t num_slots,
                             const PlannerConfig& config)
    : table_(num_layers, num_experts, num_slots),
      log2_table_(sizeof(DecayedFrequency::Log2Table), "the planner"),
      statistics_(sizeof(LayerStatistics) * static_cast<size_t>(num_layers), "the planner"),
      clock_memory_(sizeof(PlanClock), "the planner"),
      clock_(reinterpret_cast<PlanClock*>(clock_memory_.data())),
      planning_(MakePlanningView(config, table_.view(),
                                 reinterpret_cast<const int32_t*>(log2_table_.data()),
                                 reinterpret_cast<LayerStatistics*>(statistics_.data()))),
      top_k_(config.top_k) {
  if (config.policy == PolicyKind::kPredictedNeed) {
    need_ = std::make_unique<DeviceNeedState>(num_layers, num_experts, config.top_k, num_slots);
    planning_.need = need_->view();
  }
  const DecayedFrequency::Log2Table log2_table = DecayedFrequency::MakeLog2Table();
  Copy(log2_table_.data(), log2_table.data(), log2_table_.num_bytes());
  const std::vector<LayerStatistics> zeros(static_cast<size_t>(num_layers));
  Copy(statistics_.data(), zeros.data(), statistics_.num_bytes());
  const PlanClock clock{};
  Copy(clock_, &clock, sizeof clock);
}

void DevicePlanner::PlanLayer(int32_t layer, const RoutedIds& ids, LayerPlan* plan,
                              LayerPlan* host_plan, MissFetch fetch, cudaStream_t stream) {
  if (unlearned_layer_) {
    throw std::logic_error("Learn was not called after the last plan, of layer " +
                           std::to_string(*unlearned_layer_));
  }
  if (ids.count % top_k_ != 0 || ids.count > kMaxDecodeTokens * top_k_) {
    throw std::invalid_argument(
        "the planner kernel plans 0 to " + std::to_string(kMaxDecodeTokens) + " tokens of " +
        std::to_string(top_k_) + " routed ids each, not " + std::to_string(ids.count) + " ids");
  }
  LaunchPlanLayer(planning_,
                  {.layer = layer,
                   .ids = ids,
                   .fetch = fetch,
                   .clock = clock_,
                   .plan = plan,
                   .host_plan = host_plan},
                  stream);
  if (need_ != nullptr) unlearned_layer_ = layer;
}

void DevicePlanner::Learn(int32_t layer, cudaStream_t stream) {
  if (need_ == nullptr) return;
  if (unlearned_layer_ && unlearned_layer_ != layer) {
    throw std::logic_error("cannot learn from layer " + std::to_string(layer) +
                           ": the last plan was of layer " + std::to_string(*unlearned_layer_));
  }
  LaunchLearnNeeds(planning_, layer, stream);
  unlearned_layer_.reset();
}

std::vector<LayerStatistics> DevicePlanner::ReadStatistics() const {
  std::vector<LayerStatistics> statistics(static_cast<size_t>(table_.view().num_layers));
  Copy(statistics.data(), statistics_.data(), statistics_.num_bytes());
  return statistics;
}

PlanClock DevicePlanner::ReadClock() const {
  PlanClock clock;
  Copy(&clock, clock_, sizeof clock);
  return clock;
}

void DevicePlanner::SetTick(Tick now) {
  PlanClock clock = ReadClock();
  clock.now = now;
  Copy(clock_, &clock, sizeof clock);
}

}  // namespace expertflow
