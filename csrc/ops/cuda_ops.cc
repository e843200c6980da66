// The ops that take CUDA tensors.
#ifdef EXPERTFLOW_WITH_CUDA
#include <torch/csrc/stable/library.h>

#include "cuda/expert_cache.h"
#include "ops/current_stream.h"
#include "ops/unwrap.h"

namespace expertflow::ops {
namespace {

Tensor PlanOp(Tensor cache, Tensor expert_ids, int64_t layer) {
  CheckIds(expert_ids);
  const auto owner = Unwrap<cuda::ExpertCache>(cache, Backend::kCuda);
  if (expert_ids.get_device_index() != owner->device()) {
    throw std::invalid_argument("expert_ids is on another device than the expert cache");
  }
  const Plan& plan =
      owner->BeginLayer(Saturated(layer), static_cast<const int64_t*>(expert_ids.const_data_ptr()),
                        static_cast<size_t>(expert_ids.numel()), Saturated(expert_ids.size(0)),
                        CurrentStream(owner->device()));
  return ToTensor(plan, cache);
}

}  // namespace
}  // namespace expertflow::ops

STABLE_TORCH_LIBRARY_IMPL(expertflow, CUDA, m) {
  m.impl("plan", TORCH_BOX(&expertflow::ops::PlanOp));
}
#endif
