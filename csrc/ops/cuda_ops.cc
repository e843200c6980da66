// The ops that take CUDA tensors.
#ifdef EXPERTFLOW_WITH_CUDA
#include <torch/csrc/stable/library.h>

#include "cuda/decode.h"
#include "cuda/device_guard.h"
#include "cuda/expert_cache.h"
#include "cuda/upload.h"
#include "cuda/weighted_sum.h"
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

// Checks the tensors of a decode step, and makes room for what it needs beside them.
class StepTensors {
 public:
  StepTensors(const cuda::ExpertCache& cache, const Tensor& hidden_states,
              const Tensor& expert_weights, const Tensor& output)
      : hidden_states_(hidden_states), expert_weights_(expert_weights), output_(output) {
    CheckMatrix(hidden_states, "hidden_states", cache.device());
    CheckMatrix(expert_weights, "expert_weights", cache.device());
    CheckMatrix(output, "output", cache.device());
    num_tokens_ = Saturated(hidden_states.size(0));
    top_k_ = Saturated(expert_weights.size(1));
    const size_t workspace_bytes = cuda::DecodeWorkspaceBytes(cache, num_tokens_, top_k_);
    const ExpertMlpShape& shape = cache.mlp()->shape();
    for (const Tensor& tensor : {hidden_states, output}) {
      if (tensor.size(0) == num_tokens_ && tensor.size(1) == shape.hidden &&
          ToDType(tensor, "hidden_states") == shape.dtype) {
        continue;
      }
      throw std::invalid_argument("hidden_states and output must be [tokens, " +
                                  std::to_string(shape.hidden) + "] in " + DTypeName(shape.dtype));
    }
    if (expert_weights.size(0) != num_tokens_) {
      throw std::invalid_argument("expert_weights must have a row for each of hidden_states");
    }
    partial_ = torch::stable::new_empty(hidden_states, {num_tokens_ * top_k_, shape.hidden});
    const size_t num_elements = workspace_bytes / hidden_states.element_size();
    workspace_ = torch::stable::new_empty(hidden_states, {static_cast<int64_t>(num_elements)});
  }

  cuda::DecodeStep step() const {
    return {.hidden = hidden_states_.const_data_ptr(),
            .weights = expert_weights_.const_data_ptr(),
            .weights_dtype = ToDType(expert_weights_, "expert_weights"),
            .output = output_.mutable_data_ptr(),
            .partial = partial_.mutable_data_ptr(),
            .workspace = workspace_.mutable_data_ptr(),
            .num_tokens = num_tokens_,
            .top_k = top_k_};
  }

 private:
  Tensor hidden_states_;
  Tensor expert_weights_;
  Tensor output_;
  Tensor partial_;
  Tensor workspace_;
  int32_t num_tokens_;
  int32_t top_k_;
};

void ComputeOp(Tensor cache, Tensor hidden_states, Tensor expert_weights, Tensor output) {
  const auto owner = Unwrap<cuda::ExpertCache>(cache, Backend::kCuda);
  const StepTensors tensors(*owner, hidden_states, expert_weights, output);
  cuda::ComputeDecodeStep(*owner, tensors.step(), CurrentStream(owner->device()));
}

void ComputeSlotsOp(Tensor cache, Tensor slots, Tensor hidden_states, Tensor expert_weights,
                    Tensor output) {
  CheckInt64Cpu(slots, "slots");
  const auto owner = Unwrap<cuda::ExpertCache>(cache, Backend::kCuda);
  const StepTensors tensors(*owner, hidden_states, expert_weights, output);
  cuda::ComputeSlots(*owner, Values(slots), tensors.step(), CurrentStream(owner->device()));
}

void WeightedSumOp(Tensor partial, Tensor expert_weights, Tensor output) {
  const int device = output.get_device_index();
  CheckMatrix(partial, "partial", device);
  CheckMatrix(expert_weights, "expert_weights", device);
  CheckMatrix(output, "output", device);
  const auto num_tokens = Saturated(output.size(0));
  const auto top_k = Saturated(expert_weights.size(1));
  const DType dtype = ToDType(output, "output");
  if (expert_weights.size(0) != num_tokens || partial.size(0) != int64_t{num_tokens} * top_k ||
      partial.size(1) != output.size(1) || ToDType(partial, "partial") != dtype) {
    throw std::invalid_argument(
        "partial must be [tokens * k, hidden] for an output of [tokens, hidden] in its dtype, "
        "and expert_weights [tokens, k]");
  }
  const DeviceGuard guard(device);
  LaunchWeightedSum({.partial = partial.const_data_ptr(),
                     .weights = expert_weights.const_data_ptr(),
                     .output = output.mutable_data_ptr(),
                     .num_tokens = num_tokens,
                     .top_k = top_k,
                     .hidden = Saturated(output.size(1)),
                     .dtype = dtype,
                     .weights_dtype = ToDType(expert_weights, "expert_weights")},
                    CurrentStream(device));
}

void UploadOp(Tensor values, Tensor output) {
  if (values.scalar_type() != ScalarType::Int || !values.is_cpu() || !values.is_contiguous() ||
      output.scalar_type() != ScalarType::Int || !output.is_cuda() || !output.is_contiguous() ||
      values.numel() != output.numel()) {
    throw std::invalid_argument(
        "values must be contiguous int32 on the CPU, and output as many on a CUDA device");
  }
  const int device = output.get_device_index();
  const DeviceGuard guard(device);
  cuda::Upload(
      {static_cast<const int32_t*>(values.const_data_ptr()), static_cast<size_t>(values.numel())},
      static_cast<int32_t*>(output.mutable_data_ptr()), CurrentStream(device));
}

}  // namespace
}  // namespace expertflow::ops

STABLE_TORCH_LIBRARY_IMPL(expertflow, CUDA, m) {
  m.impl("plan", TORCH_BOX(&expertflow::ops::PlanOp));
  m.impl("compute", TORCH_BOX(&expertflow::ops::ComputeOp));
  m.impl("compute_slots", TORCH_BOX(&expertflow::ops::ComputeSlotsOp));
  m.impl("weighted_sum", TORCH_BOX(&expertflow::ops::WeightedSumOp));
  m.impl("upload", TORCH_BOX(&expertflow::ops::UploadOp));
}
#endif
