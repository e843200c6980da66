#include <cuda_runtime.h>

#include <algorithm>
#include <bitset>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/cuda_error.h"
#include "cuda/expert_mlp.h"
#include "cuda/expert_mlp/column_kernel.h"
#include "cuda/expert_mlp/params.h"
#include "cuda/expert_mlp/row_kernel.h"
#include "cuda/overlapped_launch.h"

namespace expertflow {
namespace {

[[noreturn]] void Refuse(const std::string& message) {
  throw std::invalid_argument("expert MLP: " + message);
}

void CheckAligned(size_t bytes, const char* name) {
  if (bytes % 16 == 0) return;
  Refuse(std::string(name) + " is " + std::to_string(bytes) + ", no multiple of 16 bytes");
}

void CheckAligned(const void* data, const char* name) {
  if (data != nullptr && reinterpret_cast<uintptr_t>(data) % 16 == 0) return;
  Refuse(std::string(name) + " must be device memory aligned to 16 bytes");
}

void CheckShape(const ExpertMlpShape& shape) {
  if (shape.hidden <= 0 || shape.hidden % 8 != 0 || shape.intermediate <= 0 ||
      shape.intermediate % 8 != 0) {
    Refuse("hidden size " + std::to_string(shape.hidden) + " and intermediate size " +
           std::to_string(shape.intermediate) + " must be positive multiples of 8");
  }
  CheckAligned(shape.slot_stride_bytes, "the stride of the slots");
  CheckAligned(shape.gate_up_offset_bytes, "the offset of gate_up_proj");
  CheckAligned(shape.down_offset_bytes, "the offset of down_proj");
  CheckAligned(shape.gate_up_bias_offset_bytes, "the offset of gate_up_proj_bias");
  CheckAligned(shape.down_bias_offset_bytes, "the offset of down_proj_bias");
}

void CheckGroups(std::span<const PairGroup> groups, int32_t num_places) {
  std::bitset<ExpertMlp::kMaxPairs> seen;
  for (const PairGroup& group : groups) {
    if (group.slot < 0) Refuse("there is no slot " + std::to_string(group.slot));
    for (const int32_t place : group.places) {
      if (place < 0 || place >= num_places) {
        Refuse("place " + std::to_string(place) + " is outside the output of " +
               std::to_string(num_places) + " rows");
      }
      if (seen[static_cast<size_t>(place)]) {
        Refuse("place " + std::to_string(place) + " is given twice");
      }
      seen.set(static_cast<size_t>(place));
    }
  }
}

void CheckBatch(const ExpertMlpBatch& batch) {
  if (batch.num_tokens < 1 || batch.num_tokens > ExpertMlp::kMaxTokens) {
    Refuse(std::to_string(batch.num_tokens) + " tokens, where 1 to " +
           std::to_string(ExpertMlp::kMaxTokens) + " are supported");
  }
  if (batch.top_k < 1 || batch.top_k > ExpertMlp::kMaxPairs / batch.num_tokens) {
    Refuse("top-" + std::to_string(batch.top_k) + " of " + std::to_string(batch.num_tokens) +
           " tokens is not 1 to " + std::to_string(ExpertMlp::kMaxPairs) + " places");
  }
  CheckAligned(batch.slots, "the slots");
  CheckAligned(batch.hidden, "the hidden states");
  CheckAligned(batch.partial, "the partial output");
  CheckAligned(batch.workspace, "the workspace");
  CheckGroups(batch.groups, batch.num_tokens * batch.top_k);
}

const std::byte* Offset(const void* slots, size_t bytes) {
  return static_cast<const std::byte*>(slots) + bytes;
}

// The gate-up kernel reads a place's token and writes row i of the workspace for the i-th place of
// the launch.
mlp::Params GateUpParams(const ExpertMlpShape& shape, const ExpertMlpBatch& batch) {
  mlp::Params params;
  params.weights = Offset(batch.slots, shape.gate_up_offset_bytes);
  params.bias = Offset(batch.slots, shape.gate_up_bias_offset_bytes);
  params.slot_stride_bytes = shape.slot_stride_bytes;
  params.input = batch.hidden;
  params.output = batch.workspace;
  params.num_inputs = shape.hidden;
  params.num_outputs = 2 * shape.intermediate;
  params.num_passes = 0;
  uint16_t pair = 0;
  for (const PairGroup& group : batch.groups) {
    for (size_t i = 0; i < group.places.size(); ++i, ++pair) {
      if (i % mlp::kMaxTokens == 0) {
        params.passes[params.num_passes++] = {group.slot, pair, 0};
      }
      ++params.passes[params.num_passes - 1].num_pairs;
      params.input_rows[pair] = static_cast<uint16_t>(group.places[i] / batch.top_k);
      params.output_rows[pair] = pair;
    }
  }
  return params;
}

// The down kernel reads the rows that the gate-up kernel wrote, and writes to the places.
mlp::Params DownParams(const ExpertMlpShape& shape, const ExpertMlpBatch& batch,
                       const mlp::Params& gate_up) {
  mlp::Params params = gate_up;
  params.weights = Offset(batch.slots, shape.down_offset_bytes);
  params.bias = Offset(batch.slots, shape.down_bias_offset_bytes);
  params.input = batch.workspace;
  params.output = batch.partial;
  params.num_inputs = shape.intermediate;
  params.num_outputs = shape.hidden;
  std::copy_n(gate_up.output_rows, ExpertMlp::kMaxPairs, params.input_rows);
  uint16_t pair = 0;
  for (const PairGroup& group : batch.groups) {
    for (const int32_t place : group.places) {
      params.output_rows[pair++] = static_cast<uint16_t>(place);
    }
  }
  return params;
}

int32_t MaxPairs(const mlp::Params& params) {
  int32_t max_pairs = 0;
  for (const mlp::Pass& pass : std::span(params.passes, static_cast<size_t>(params.num_passes))) {
    max_pairs = std::max<int32_t>(max_pairs, pass.num_pairs);
  }
  return max_pairs;
}

}  // namespace

ExpertMlp::ExpertMlp(const ExpertMlpShape& shape) : shape_(shape) {
  CheckShape(shape);
  switch (shape.dtype) {
    case DType::kFloat32:
      UseKernelsOf<float>();
      break;
    case DType::kBFloat16:
      UseKernelsOf<__nv_bfloat16>();
      break;
    case DType::kFloat16:
      UseKernelsOf<__half>();
      break;
  }
  PrepareDevice();
}

template <class Scalar>
void ExpertMlp::UseKernelsOf() {
  using enum mlp::Stage;
  const auto variant = [this]<int kTokens>() -> Variant {
    if (shape_.kind == ExpertMlpKind::kStandard) {
      using Layout = mlp::RowLayout<Scalar, kGateUp>;
      return {kTokens, Layout::kThreads, mlp::kRingBytes<Layout>,
              reinterpret_cast<const void*>(&mlp::RowKernel<Scalar, kTokens, kGateUp>),
              reinterpret_cast<const void*>(&mlp::RowKernel<Scalar, kTokens, kDown>)};
    }
    return {kTokens, mlp::ColumnLayout<Scalar, kGateUp>::kThreads,
            mlp::kColumnSharedBytes<Scalar, kTokens>,
            reinterpret_cast<const void*>(&mlp::ColumnKernel<Scalar, kTokens, kGateUp>),
            reinterpret_cast<const void*>(&mlp::ColumnKernel<Scalar, kTokens, kDown>)};
  };
  variants_[0] = variant.template operator()<1>();
  variants_[1] = variant.template operator()<4>();
  variants_[2] = variant.template operator()<mlp::kMaxTokens>();
}

void ExpertMlp::PrepareDevice() {
  int device;
  int num_multiprocessors;
  int max_shared_bytes;
  EXPERTFLOW_CUDA_CHECK(cudaGetDevice(&device));
  EXPERTFLOW_CUDA_CHECK(
      cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device));
  EXPERTFLOW_CUDA_CHECK(cudaDeviceGetAttribute(
      &max_shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  for (Variant& variant : variants_) {
    const auto shared_bytes = static_cast<int>(variant.shared_bytes);
    int blocks_per_multiprocessor = std::numeric_limits<int>::max();
    for (const void* kernel : {variant.gate_up, variant.down}) {
      EXPERTFLOW_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          std::to_string(shared_bytes) + " bytes of shared memory");
      int num_blocks;
      EXPERTFLOW_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &num_blocks, kernel, variant.num_threads, variant.shared_bytes));
      blocks_per_multiprocessor = std::min(blocks_per_multiprocessor, num_blocks);
    }
    // A block of one kernel starts beside one of the other only if both find the multiprocessor
    // split alike between shared memory and L1, which holds the inputs.
    const int needed_bytes = blocks_per_multiprocessor * (shared_bytes + 1024);
    const int percent = std::min(100, (needed_bytes * 100 - 1) / max_shared_bytes + 1);
    for (const void* kernel : {variant.gate_up, variant.down}) {
      EXPERTFLOW_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, percent));
    }
    // One block loads while another sums up, and the next kernel's blocks take the places of this
    // one's one by one. At 1 token two blocks on each multiprocessor reach 84 % (Qwen3-30B-A3B) and
    // 98 % (Mixtral) of the rate of a kernel that only reads, one reaches 77 and 86 % (H100,
    // 2026-11-25).
    variant.num_blocks = static_cast<unsigned>(num_multiprocessors * blocks_per_multiprocessor);
  }
}

size_t ExpertMlp::WorkspaceBytes(int32_t num_pairs) const {
  return static_cast<size_t>(num_pairs) * static_cast<size_t>(shape_.intermediate) *
         ElementBytes(shape_.dtype);
}

void ExpertMlp::Launch(const ExpertMlpBatch& batch, cudaStream_t stream) const {
  CheckBatch(batch);
  const mlp::Params gate_up = GateUpParams(shape_, batch);
  if (gate_up.num_passes == 0) return;
  const mlp::Params down = DownParams(shape_, batch, gate_up);
  const int32_t max_pairs = MaxPairs(gate_up);
  const Variant* variant = variants_;
  while (variant->max_tokens < max_pairs) ++variant;
  LaunchStage(*variant, variant->gate_up, gate_up, stream);
  LaunchStage(*variant, variant->down, down, stream);
}

void ExpertMlp::LaunchStage(const Variant& variant, const void* kernel, const mlp::Params& params,
                            cudaStream_t stream) const {
  void* arguments[] = {const_cast<mlp::Params*>(&params)};
  LaunchOverlapped({.kernel = kernel,
                    .num_blocks = variant.num_blocks,
                    .num_threads = static_cast<unsigned>(variant.num_threads),
                    .shared_bytes = variant.shared_bytes},
                   arguments, stream);
}

}  // namespace expertflow
