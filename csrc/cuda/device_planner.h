#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/layer_plan.h"
#include "core/planner.h"
#include "core/planning.h"
#include "core/statistics.h"
#include "cuda/device_memory.h"
#include "cuda/device_need_state.h"
#include "cuda/device_slot_table.h"

namespace expertflow {

// Plans decode layers on the device: the planner kernel with all it works on, in the memory of the
// device that is current when it is made. Plans of one planner must be ordered, by one stream or by
// events, and are enqueued by one thread at a time. Nothing is allocated after construction.
class DevicePlanner {
 public:
  // Throws as Planner and DeviceSlotTable do.
  DevicePlanner(int32_t num_layers, int32_t num_experts, int32_t num_slots,
                const PlannerConfig& config);

  // Enqueues the plan of at most kMaxDecodeTokens tokens of top-k ids each, see LaunchPlanLayer;
  // also into a graph that is being captured. Throws std::invalid_argument for other ids. `plan`
  // lies in device memory, `host_plan` (or nullptr) in mapped host memory; both must stay while the
  // launch, or the graph, is in use. Throws std::logic_error if the policy learns and has not
  // learned from the plan before. Of such a policy, `expert_key` in the table follows with Learn.
  void PlanLayer(int32_t layer, const RoutedIds& ids, LayerPlan* plan, LayerPlan* host_plan,
                 MissFetch fetch, cudaStream_t stream);

  // Enqueues what the policy records of the last plan, which was of `layer`, and learns from it,
  // see LaunchLearnNeeds; nothing for a policy that does not learn. To be called after every plan,
  // and captured in the same graph. Throws std::logic_error if the last plan was of another layer,
  // and has not been learned from.
  void Learn(int32_t layer, cudaStream_t stream);

  DeviceSlotTable& table() { return table_; }
  const PlanningView& planning() const { return planning_; }
  PlanClock* clock() { return clock_; }  // in device memory

  // These wait for all work of the device.
  std::vector<LayerStatistics> ReadStatistics() const;
  PlanClock ReadClock() const;
  // Continues where plans made on the host have ended.
  void SetTick(Tick now);

 private:
  DeviceSlotTable table_;
  DeviceMemory log2_table_;
  DeviceMemory statistics_;
  DeviceMemory clock_memory_;
  PlanClock* clock_;
  std::unique_ptr<DeviceNeedState> need_;  // of PolicyKind::kPredictedNeed
  PlanningView planning_;
  int32_t top_k_;
  std::optional<int32_t> unlearned_layer_;  // to be learned from before the next plan
};

}  // namespace expertflow
