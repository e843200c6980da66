#include "core/simulation/virtual_decoder.h"

namespace expertflow {

VirtualDecoder::VirtualDecoder(Planner& planner, VirtualTransfers& transfers, const Costs& costs)
    : planner_(planner), transfers_(transfers), costs_(costs) {}

void VirtualDecoder::Compute(int64_t work_ns) {
  const int64_t end_ns = transfers_.EndOfCompute(now_ns_, work_ns, costs_.copy_slowdown);
  compute_ns_ += end_ns - now_ns_;
  now_ns_ = end_ns;
}

const Plan& VirtualDecoder::PlanLayer(int32_t layer, std::span<const int64_t> experts, Tick tick) {
  const Plan* plan = planner_.PlanLayer(layer, experts, /*num_tokens=*/1, tick);
  if (plan == nullptr) {
    const int64_t free_ns = transfers_.CancelAll(now_ns_);
    stall_ns_ += free_ns - now_ns_;
    now_ns_ = free_ns;
    plan = planner_.PlanLayer(layer, experts, /*num_tokens=*/1, tick);
  }
  return *plan;
}

void VirtualDecoder::PostMisses(const Plan& plan) {
  for (const PlanRow& row : plan.rows) {
    if (row.state == RowState::kLoading) transfers_.Promote(row.slot, plan.tick);
    if (row.state == RowState::kMiss && row.wave == 0) {
      transfers_.Post(row.slot, TransferClass::kDemand, plan.tick, now_ns_);
    }
  }
}

void VirtualDecoder::AwaitRow(const PlanRow& row) {
  const int64_t ready_ns = transfers_.WaitUntilReady(row.slot, now_ns_);
  stall_ns_ += ready_ns - now_ns_;
  if (row.state == RowState::kLoading) late_stall_ns_ += ready_ns - now_ns_;
  now_ns_ = ready_ns;
}

}  // namespace expertflow
