#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "cuda/expert_mlp/elements.h"
#include "cuda/expert_mlp/params.h"
#include "cuda/expert_mlp/result.h"
#include "cuda/expert_mlp/weight_stream.h"

// Matrices [outputs, inputs], ExpertMlpKind::kStandard. A unit is two rows, reduced by one warp:
// row i of the gate and of the up projection, or rows 2i and 2i + 1 of the down projection.

namespace expertflow::mlp {

// Lane l has chunks l, l + 32, ... of both rows.
template <class Scalar, Stage kStage>
class RowLayout {
 public:
  static constexpr int kThreads = 512;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kDepth = 3;

  __device__ explicit RowLayout(const Params& params)
      : num_units_(params.num_outputs / 2),
        num_chunks_(params.num_inputs / kChunkElements<Scalar>),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ int num_units() const { return num_units_; }
  __device__ int num_steps() const { return (num_chunks_ + 31) / 32; }
  __device__ int ChunkAt(int step) const { return step * 32 + lane_; }
  __device__ bool Has(int step) const { return ChunkAt(step) < num_chunks_; }
  __device__ size_t step_bytes() const { return 32 * 16; }
  __device__ size_t second_bytes() const {
    return row_bytes() * static_cast<size_t>(kStage == Stage::kGateUp ? num_units_ : 1);
  }
  __device__ const std::byte* UnitStart(const std::byte* matrix, int unit) const {
    const int row = kStage == Stage::kGateUp ? unit : 2 * unit;
    return matrix + row_bytes() * static_cast<size_t>(row) + lane_ * 16;
  }

 private:
  __device__ size_t row_bytes() const { return static_cast<size_t>(num_chunks_) * 16; }

  int num_units_;
  int num_chunks_;
  int lane_;
};

__device__ inline float WarpSum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = __fadd_rn(value, __shfl_xor_sync(0xFFFFFFFFU, value, offset));
  }
  return value;
}

// Adds one chunk of both rows, for each token of the pass.
template <class Scalar, int kTokens>
__device__ void MultiplyRows(const WeightPair& weights, const uint4* const (&inputs)[kTokens],
                             int chunk, int num_tokens, float (&first)[kTokens],
                             float (&second)[kTokens]) {
  constexpr int kElements = kChunkElements<Scalar>;
  float first_weights[kElements];
  float second_weights[kElements];
  Unpack<Scalar>(weights.first, first_weights);
  Unpack<Scalar>(weights.second, second_weights);
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    if (token >= num_tokens) break;
    float x[kElements];
    Unpack<Scalar>(inputs[token][chunk], x);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      first[token] = __fmaf_rn(first_weights[i], x[i], first[token]);
      second[token] = __fmaf_rn(second_weights[i], x[i], second[token]);
    }
  }
}

template <class Scalar, int kTokens, Stage kStage>
__global__ void __launch_bounds__(RowLayout<Scalar, kStage>::kThreads, kTokens <= 4 ? 2 : 1)
    RowKernel(const __grid_constant__ Params params) {
  constexpr int kWarps = RowLayout<Scalar, kStage>::kWarps;
  extern __shared__ uint4 ring[];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const RowLayout<Scalar, kStage> layout(params);
  // Neighbouring units go to different multiprocessors, so that the last ones are spread evenly.
  const int grid = static_cast<int>(gridDim.x);
  const int first_unit = static_cast<int>(threadIdx.x) / 32 * grid + static_cast<int>(blockIdx.x);
  WeightStream stream(params, layout, ring, first_unit, kWarps * grid);
  stream.Start();

  const int num_units = params.num_passes * layout.num_units();
  for (int unit = first_unit; unit < num_units; unit += kWarps * grid) {
    const Pass pass = params.passes[unit / layout.num_units()];
    const uint4* inputs[kTokens];
    float first[kTokens] = {};
    float second[kTokens] = {};
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const int pair = pass.first_pair + (token < pass.num_pairs ? token : 0);
      inputs[token] = reinterpret_cast<const uint4*>(static_cast<const Scalar*>(params.input) +
                                                     static_cast<size_t>(params.input_rows[pair]) *
                                                         params.num_inputs);
    }
    for (int step = 0; step < layout.num_steps(); ++step) {
      const WeightPair weights = stream.Take();
      if (!layout.Has(step)) continue;
      MultiplyRows<Scalar>(weights, inputs, layout.ChunkAt(step), pass.num_pairs, first, second);
    }
    float first_sum = 0;
    float second_sum = 0;
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      if (token >= pass.num_pairs) break;
      const float first_total = WarpSum(first[token]);
      const float second_total = WarpSum(second[token]);
      if (lane == token) {
        first_sum = first_total;
        second_sum = second_total;
      }
    }
    if (lane < pass.num_pairs) {
      WriteResult<Scalar, ExpertMlpKind::kStandard, kStage>(
          params, pass, lane, unit % layout.num_units(), first_sum, second_sum);
    }
  }
}

}  // namespace expertflow::mlp
