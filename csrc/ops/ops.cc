// torch.ops.expertflow.*: check, unwrap, call, wrap. The docstrings are in expertflow/ops.py.
//
// A cache is passed as its handle, an int64 CPU tensor [2]: the cache's number and how many ops
// were called on it. Every op counts itself there, so the mutation that the schemas declare is
// real, and torch.compile keeps the ops and their order.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <memory>
#include <span>
#include <stdexcept>

#include "host/cache_registry.h"
#include "host/expert_cache.h"

namespace expertflow {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void CheckInt64Cpu(const Tensor& tensor, const char* name) {
  if (tensor.scalar_type() != ScalarType::Long || !tensor.is_cpu() || !tensor.is_contiguous()) {
    throw std::invalid_argument(std::string(name) +
                                " must be a contiguous int64 tensor on the CPU");
  }
}

std::shared_ptr<ExpertCache> Unwrap(const Tensor& handle) {
  CheckInt64Cpu(handle, "cache");
  if (handle.numel() != 2)
    throw std::invalid_argument("cache must be a handle tensor of shape [2]");
  auto* words = static_cast<int64_t*>(handle.mutable_data_ptr());
  ++words[1];
  return FindCache(words[0]);
}

std::span<const int64_t> Values(const Tensor& tensor) {
  return {static_cast<const int64_t*>(tensor.const_data_ptr()),
          static_cast<size_t>(tensor.numel())};
}

Tensor PlanOp(Tensor cache, Tensor expert_ids, int64_t layer) {
  CheckInt64Cpu(expert_ids, "expert_ids");
  if (expert_ids.dim() != 2) throw std::invalid_argument("expert_ids must have shape [tokens, k]");
  const std::shared_ptr<ExpertCache> owner = Unwrap(cache);
  const Plan& plan =
      owner->BeginLayer(Saturated(layer), Values(expert_ids), Saturated(expert_ids.size(0)));
  constexpr int64_t kColumns = 5;
  Tensor rows =
      torch::stable::new_empty(expert_ids, {static_cast<int64_t>(plan.rows.size()), kColumns});
  auto* out = static_cast<int64_t*>(rows.mutable_data_ptr());
  for (const PlanRow& row : plan.rows) {
    for (const int32_t value :
         std::array{row.expert, Index(row.slot), Index(row.state), row.wave, row.next_row}) {
      *out++ = value;
    }
  }
  return rows;
}

void WaitOp(Tensor cache, int64_t row) { Unwrap(cache)->Wait(Saturated(row)); }

void ReleaseOp(Tensor cache, int64_t row) { Unwrap(cache)->Release(Saturated(row)); }

void PrefetchOp(Tensor cache, Tensor expert_ids, int64_t layer, int64_t distance) {
  CheckInt64Cpu(expert_ids, "expert_ids");
  Unwrap(cache)->Prefetch(Saturated(layer), Values(expert_ids), Saturated(distance));
}

}  // namespace
}  // namespace expertflow

STABLE_TORCH_LIBRARY(expertflow, m) {
  m.def("plan(Tensor(a!) cache, Tensor expert_ids, int layer) -> Tensor");
  m.def("wait(Tensor(a!) cache, int row) -> ()");
  m.def("release(Tensor(a!) cache, int row) -> ()");
  m.def("prefetch(Tensor(a!) cache, Tensor expert_ids, int layer, int distance) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(expertflow, CPU, m) {
  m.impl("plan", TORCH_BOX(&expertflow::PlanOp));
  m.impl("wait", TORCH_BOX(&expertflow::WaitOp));
  m.impl("release", TORCH_BOX(&expertflow::ReleaseOp));
  m.impl("prefetch", TORCH_BOX(&expertflow::PrefetchOp));
}
