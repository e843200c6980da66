#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>

#include "core/plan.h"
#include "host/cache_registry.h"
#include "host/expert_cache.h"
#ifdef EXPERTFLOW_WITH_CUDA
#include "cuda/expert_cache.h"
#include "ops/current_stream.h"
#endif

namespace expertflow::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throw std::invalid_argument that names the tensor.
void CheckInt64Cpu(const Tensor& tensor, const char* name);
void CheckIds(const Tensor& expert_ids);

// The cache of a handle, which counts one more op. Throws std::invalid_argument if it is no handle,
// or the cache was closed.
FoundCache Unwrap(const Tensor& handle);

// The same for an op that is registered for one backend only.
template <class Cache>
std::shared_ptr<Cache> Unwrap(const Tensor& handle, Backend backend) {
  const FoundCache found = Unwrap(handle);
  if (found.backend != backend) {
    throw std::invalid_argument("the tensors are not on the device of the expert cache");
  }
  return std::static_pointer_cast<Cache>(found.cache);
}

// Calls `on_host(cache)`, or `on_cuda(cache, stream)` with the stream that torch computes on.
template <class OnHost, class OnCuda>
void VisitCache(const Tensor& handle, OnHost on_host, [[maybe_unused]] OnCuda on_cuda) {
  const FoundCache found = Unwrap(handle);
#ifdef EXPERTFLOW_WITH_CUDA
  if (found.backend == Backend::kCuda) {
    auto& cache = *static_cast<cuda::ExpertCache*>(found.cache.get());
    return on_cuda(cache, CurrentStream(cache.device()));
  }
#endif
  on_host(*static_cast<ExpertCache*>(found.cache.get()));
}

// The values of a contiguous int64 CPU tensor.
std::span<const int64_t> Values(const Tensor& tensor);

// The rows of a plan that was made for `expert_ids`, int64 [rows, 6] on the CPU; `handle` is any
// CPU tensor of that dtype.
Tensor ToTensor(const Plan& plan, std::span<const int64_t> expert_ids, const Tensor& handle);

}  // namespace expertflow::ops
