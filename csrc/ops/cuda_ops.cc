// The ops that take CUDA tensors.
#ifdef EXPERTFLOW_WITH_CUDA
#include <torch/csrc/stable/library.h>

#include "cuda/decode.h"
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
  return ToTensor(plan, owner->routed_ids(), cache);
}

DType ToDType(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      throw std::invalid_argument(std::string(name) + " must be float32, bfloat16 or float16");
  }
}

void CheckMatrix(const Tensor& tensor, const char* name, int device) {
  if (tensor.dim() == 2 && tensor.is_contiguous() && tensor.is_cuda() &&
      tensor.get_device_index() == device) {
    return;
  }
  throw std::invalid_argument(
      std::string(name) +
      " must be contiguous, of two dimensions, and on cuda:" + std::to_string(device));
}

Tensor ComputeOp(Tensor cache, Tensor hidden_states, Tensor expert_weights) {
  const auto owner = Unwrap<cuda::ExpertCache>(cache, Backend::kCuda);
  CheckMatrix(hidden_states, "hidden_states", owner->device());
  CheckMatrix(expert_weights, "expert_weights", owner->device());
  const auto num_tokens = Saturated(hidden_states.size(0));
  const auto top_k = Saturated(expert_weights.size(1));
  const size_t workspace_bytes = cuda::DecodeWorkspaceBytes(*owner, num_tokens, top_k);
  const ExpertMlpShape& shape = owner->mlp()->shape();
  if (hidden_states.size(1) != shape.hidden || expert_weights.size(0) != num_tokens ||
      ToDType(hidden_states, "hidden_states") != shape.dtype) {
    throw std::invalid_argument("hidden_states must be [tokens, " + std::to_string(shape.hidden) +
                                "] in " + DTypeName(shape.dtype) +
                                ", and expert_weights [tokens, k]");
  }
  const auto elements = [&](size_t num_bytes) {
    return static_cast<int64_t>(num_bytes / hidden_states.element_size());
  };
  Tensor output = torch::stable::new_empty(hidden_states, {num_tokens, shape.hidden});
  Tensor partial = torch::stable::new_empty(hidden_states, {num_tokens * top_k, shape.hidden});
  Tensor workspace = torch::stable::new_empty(hidden_states, {elements(workspace_bytes)});
  cuda::ComputeDecodeStep(*owner,
                          {.hidden = hidden_states.const_data_ptr(),
                           .weights = expert_weights.const_data_ptr(),
                           .weights_dtype = ToDType(expert_weights, "expert_weights"),
                           .output = output.mutable_data_ptr(),
                           .partial = partial.mutable_data_ptr(),
                           .workspace = workspace.mutable_data_ptr(),
                           .num_tokens = num_tokens,
                           .top_k = top_k},
                          CurrentStream(owner->device()));
  return output;
}

}  // namespace
}  // namespace expertflow::ops

STABLE_TORCH_LIBRARY_IMPL(expertflow, CUDA, m) {
  m.impl("plan", TORCH_BOX(&expertflow::ops::PlanOp));
  m.impl("compute", TORCH_BOX(&expertflow::ops::ComputeOp));
}
#endif
