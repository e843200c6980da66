#include "ops/unwrap.h"

#include <array>
#include <vector>

namespace expertflow::ops {

void CheckInt64Cpu(const Tensor& tensor, const char* name) {
  if (tensor.scalar_type() != ScalarType::Long || !tensor.is_cpu() || !tensor.is_contiguous()) {
    throw std::invalid_argument(std::string(name) +
                                " must be a contiguous int64 tensor on the CPU");
  }
}

void CheckIds(const Tensor& expert_ids) {
  if (expert_ids.scalar_type() != ScalarType::Long || !expert_ids.is_contiguous()) {
    throw std::invalid_argument("expert_ids must be a contiguous int64 tensor");
  }
  if (expert_ids.dim() != 2) throw std::invalid_argument("expert_ids must have shape [tokens, k]");
}

FoundCache Unwrap(const Tensor& handle) {
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

Tensor ToTensor(const Plan& plan, std::span<const int64_t> expert_ids, const Tensor& handle) {
  constexpr int64_t kColumns = 6;
  std::vector<int64_t> counts;  // of every expert in `expert_ids`
  for (const int64_t id : expert_ids) {
    if (id >= std::ssize(counts)) counts.resize(static_cast<size_t>(id) + 1);
    ++counts[static_cast<size_t>(id)];
  }
  Tensor rows =
      torch::stable::new_empty(handle, {static_cast<int64_t>(plan.rows.size()), kColumns});
  auto* out = static_cast<int64_t*>(rows.mutable_data_ptr());
  for (const PlanRow& row : plan.rows) {
    for (const int32_t value :
         std::array{row.expert, Index(row.slot), Index(row.state), row.wave, row.next_row}) {
      *out++ = value;
    }
    *out++ = counts[static_cast<size_t>(row.expert)];
  }
  return rows;
}

}  // namespace expertflow::ops
