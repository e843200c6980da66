// torch.ops.expertflow.*: check, unwrap, call, wrap. The docstrings are in expertflow/ops.py.
//
// A cache is passed as its handle, an int64 CPU tensor [2]: the cache's number and how many ops
// were called on it. Every op counts itself there, so the mutation that the schemas declare is
// real, and torch.compile keeps the ops and their order.

#include <torch/csrc/stable/library.h>

#include <memory>

#include "host/expert_cache.h"
#include "ops/unwrap.h"

namespace expertflow::ops {
namespace {

Tensor PlanOp(Tensor cache, Tensor expert_ids, int64_t layer) {
  CheckIds(expert_ids);
  const auto owner = Unwrap<ExpertCache>(cache, Backend::kHost);
  const Plan& plan =
      owner->BeginLayer(Saturated(layer), Values(expert_ids), Saturated(expert_ids.size(0)));
  return ToTensor(plan, Values(expert_ids), cache);
}

void WaitOp(Tensor cache, int64_t row) {
  VisitCache(
      cache, [&](ExpertCache& owner) { owner.Wait(Saturated(row)); },
      [&](auto& owner, auto stream) { owner.Wait(Saturated(row), stream); });
}

void ReleaseOp(Tensor cache, int64_t row) {
  VisitCache(
      cache, [&](ExpertCache& owner) { owner.Release(Saturated(row)); },
      [&](auto& owner, auto stream) { owner.Release(Saturated(row), stream); });
}

void PrefetchOp(Tensor cache, Tensor expert_ids, int64_t layer, int64_t distance) {
  CheckInt64Cpu(expert_ids, "expert_ids");
  const auto prefetch = [&](auto& owner) {
    owner.Prefetch(Saturated(layer), Values(expert_ids), Saturated(distance));
  };
  VisitCache(cache, prefetch, [&](auto& owner, auto) { prefetch(owner); });
}

}  // namespace
}  // namespace expertflow::ops

STABLE_TORCH_LIBRARY(expertflow, m) {
  m.def("plan(Tensor(a!) cache, Tensor expert_ids, int layer) -> Tensor");
  m.def("wait(Tensor(a!) cache, int row) -> ()");
  m.def("release(Tensor(a!) cache, int row) -> ()");
  m.def("prefetch(Tensor(a!) cache, Tensor expert_ids, int layer, int distance) -> ()");
  m.def(
      "compute(Tensor(a!) cache, Tensor hidden_states, Tensor expert_weights, Tensor(b!) output) "
      "-> ()");
  m.def(
      "compute_slots(Tensor(a!) cache, Tensor slots, Tensor hidden_states, Tensor expert_weights, "
      "Tensor(b!) output) -> ()");
  m.def("weighted_sum(Tensor partial, Tensor expert_weights, Tensor(a!) output) -> ()");
  m.def("upload(Tensor values, Tensor(a!) output) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(expertflow, CPU, m) {
  m.impl("plan", TORCH_BOX(&expertflow::ops::PlanOp));
  m.impl("wait", TORCH_BOX(&expertflow::ops::WaitOp));
  m.impl("release", TORCH_BOX(&expertflow::ops::ReleaseOp));
  m.impl("prefetch", TORCH_BOX(&expertflow::ops::PrefetchOp));
}
