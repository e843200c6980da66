#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/expert_mlp.h"

namespace expertflow::mlp {

constexpr int kMaxTokens = 8;  // of one expert at once; more are a second pass over its weights

// Which of an expert's two matrices a kernel applies.
enum class Stage { kGateUp, kDown };

// Up to kMaxTokens tokens of one expert: entries first_pair ... of the row lists.
struct Pass {
  int32_t slot;
  uint16_t first_pair;
  uint16_t num_pairs;
};

// One kernel's work, passed by value, so that a launch needs no copy to the device. The matrix has
// `num_inputs` times `num_outputs` elements.
struct Params {
  const std::byte* weights;  // of slot 0
  const std::byte* bias;     // of slot 0; unused by kStandard
  size_t slot_stride_bytes;
  const void* input;  // rows of num_inputs
  void* output;       // rows of num_outputs; after the activation half as many
  int32_t num_inputs;
  int32_t num_outputs;
  int32_t num_passes;
  Pass passes[ExpertMlp::kMaxPairs];
  uint16_t input_rows[ExpertMlp::kMaxPairs];
  uint16_t output_rows[ExpertMlp::kMaxPairs];
};
static_assert(sizeof(Params) <= 4096, "kernel parameters are limited to 4 KiB before CUDA 12.1");

}  // namespace expertflow::mlp
