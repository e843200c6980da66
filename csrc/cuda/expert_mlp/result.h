#pragma once

#include <cuda_runtime.h>

#include "cuda/expert_mlp/elements.h"
#include "cuda/expert_mlp/params.h"

namespace expertflow::mlp {

// The intrinsics keep the compiler from fusing operations one way in one kernel and another way in
// the next: a row must have the same bits whichever kernel computes it.

__device__ inline float Sigmoid(float x) { return __fdiv_rn(1.0F, __fadd_rn(1.0F, expf(-x))); }

__device__ inline float GatedSilu(float gate, float up) {
  return __fmul_rn(__fmul_rn(gate, Sigmoid(gate)), up);
}

// GptOssExperts._apply_gate of transformers. Comparisons, not fminf: NaN must stay.
__device__ inline float GatedGptOss(float gate, float up) {
  constexpr float kAlpha = 1.702F;
  constexpr float kLimit = 7.0F;
  gate = gate > kLimit ? kLimit : gate;
  up = up > kLimit ? kLimit : (up < -kLimit ? -kLimit : up);
  const float glu = __fmul_rn(gate, Sigmoid(__fmul_rn(gate, kAlpha)));
  return __fmul_rn(__fadd_rn(up, 1.0F), glu);
}

// Finishes outputs 2i and 2i + 1 of a pair, for kStandard's gate-up outputs i and I + i.
template <class Scalar, ExpertMlpKind kKind, Stage kStage>
__device__ void WriteResult(const Params& params, const Pass& pass, int pair_in_pass, int i,
                            float first, float second) {
  auto* output = static_cast<Scalar*>(params.output);
  const int row = params.output_rows[pass.first_pair + pair_in_pass];
  if constexpr (kStage == Stage::kDown) {
    output += static_cast<size_t>(row) * params.num_outputs + 2 * i;
    output[0] = FromFloat<Scalar>(first);
    output[1] = FromFloat<Scalar>(second);
  } else {
    output += static_cast<size_t>(row) * (params.num_outputs / 2) + i;
    *output = FromFloat<Scalar>(kKind == ExpertMlpKind::kStandard ? GatedSilu(first, second)
                                                                  : GatedGptOss(first, second));
  }
}

}  // namespace expertflow::mlp
