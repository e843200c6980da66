#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "cuda/expert_mlp/elements.h"
#include "cuda/expert_mlp/input_cache.h"
#include "cuda/expert_mlp/params.h"
#include "cuda/expert_mlp/result.h"
#include "cuda/expert_mlp/weight_stream.h"

// Matrices [inputs, outputs], ExpertMlpKind::kGptOss. A unit is 256 bytes of columns, reduced by
// one block: a thread owns a chunk of columns and every 32nd row. Narrower units would read less
// than HBM likes at a time, wider ones keep fewer multiprocessors busy.

namespace expertflow::mlp {

constexpr int kTileChunks = 16;
constexpr int kWarpRows = 32 / kTileChunks;
constexpr int kBlockRows = kWarps * kWarpRows;

template <class Scalar>
constexpr int kTileColumns = kTileChunks * kChunkElements<Scalar>;

// A step is rows r and r + kBlockRows. Where the last tile leaves the matrix, threads load its last
// columns once more, for nothing.
template <class Scalar>
class ColumnLayout {
 public:
  __device__ explicit ColumnLayout(const Params& params)
      : num_rows_(params.num_inputs),
        row_chunks_(params.num_outputs / kChunkElements<Scalar>),
        row_in_step_(static_cast<int>(threadIdx.x) / kTileChunks),
        chunk_in_tile_(static_cast<int>(threadIdx.x) % kTileChunks) {}

  __device__ int num_units() const { return (row_chunks_ + kTileChunks - 1) / kTileChunks; }
  __device__ int num_steps() const { return (num_rows_ + 2 * kBlockRows - 1) / (2 * kBlockRows); }
  __device__ int FirstRow(int step) const { return step * 2 * kBlockRows + row_in_step_; }
  __device__ int SecondRow(int step) const { return FirstRow(step) + kBlockRows; }
  __device__ bool HasFirst(int step) const { return FirstRow(step) < num_rows_; }
  __device__ bool HasSecond(int step) const { return SecondRow(step) < num_rows_; }
  __device__ size_t step_bytes() const { return 2 * second_bytes(); }
  __device__ size_t second_bytes() const { return kBlockRows * row_bytes(); }
  __device__ const std::byte* UnitStart(const std::byte* matrix, int unit) const {
    const int chunk = min(unit * kTileChunks + chunk_in_tile_, row_chunks_ - 1);
    return matrix + static_cast<size_t>(row_in_step_) * row_bytes() +
           static_cast<size_t>(chunk) * 16;
  }

 private:
  __device__ size_t row_bytes() const { return static_cast<size_t>(row_chunks_) * 16; }

  int num_rows_;
  int row_chunks_;
  int row_in_step_;
  int chunk_in_tile_;
};

// Adds one row's chunk, for each token of the pass.
template <class Scalar, int kTokens>
__device__ void MultiplyColumns(const uint4& chunk, const Scalar* const (&inputs)[kTokens], int row,
                                int num_tokens, float (&sums)[kTokens][kChunkElements<Scalar>]) {
  float weights[kChunkElements<Scalar>];
  Unpack<Scalar>(chunk, weights);
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    if (token >= num_tokens) break;
    const float x = ToFloat(inputs[token][row]);
#pragma unroll
    for (int i = 0; i < kChunkElements<Scalar>; ++i) {
      sums[token][i] = __fmaf_rn(weights[i], x, sums[token][i]);
    }
  }
}

// Tokens whose sums are added up at once; more would not fit into the shared memory of all devices.
template <int kTokens>
constexpr int kReducedTokens = kTokens < 4 ? kTokens : 4;

// Sums of a block's warps, before they are added up.
template <class Scalar, int kTokens>
using WarpSums = float[kReducedTokens<kTokens>][kWarps][kTileColumns<Scalar>];

// Adds up over the lanes of a warp that have the same columns.
template <class Scalar>
__device__ void StoreWarpSums(const float (&sums)[kChunkElements<Scalar>],
                              float (&warp_sums)[kWarps][kTileColumns<Scalar>]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < kChunkElements<Scalar>; ++i) {
    float sum = sums[i];
#pragma unroll
    for (int offset = 16; offset >= kTileChunks; offset /= 2) {
      sum = __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFU, sum, offset));
    }
    if (lane < kTileChunks) {
      warp_sums[threadIdx.x / 32][lane * kChunkElements<Scalar> + i] = sum;
    }
  }
}

// Adds up the warps in their order and finishes columns 2i and 2i + 1 of `tile`.
template <class Scalar, Stage kStage>
__device__ void FinishColumns(const Params& params, const Pass& pass, int pair_in_pass, int tile,
                              int i, const float (&warp_sums)[kWarps][kTileColumns<Scalar>]) {
  const int column = tile * kTileColumns<Scalar> + 2 * i;
  if (column >= params.num_outputs) return;
  float2 total = {0, 0};
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const float2 sum = *reinterpret_cast<const float2*>(&warp_sums[warp][2 * i]);
    total.x = __fadd_rn(total.x, sum.x);
    total.y = __fadd_rn(total.y, sum.y);
  }
  WriteResult<Scalar, ExpertMlpKind::kGptOss, kStage>(params, pass, pair_in_pass, column / 2,
                                                      total.x, total.y);
}

// Adds up over the rows, a few tokens at a time.
template <class Scalar, int kTokens, Stage kStage>
__device__ void ReduceTile(const Params& params, const Pass& pass, int tile,
                           const float (&sums)[kTokens][kChunkElements<Scalar>],
                           WarpSums<Scalar, kTokens>& warp_sums) {
  constexpr int kPairs = kTileColumns<Scalar> / 2;
#pragma unroll
  for (int first = 0; first < kTokens; first += kReducedTokens<kTokens>) {
    if (first >= pass.num_pairs) break;
    __syncthreads();  // what was there has been read
#pragma unroll
    for (int i = 0; i < kReducedTokens<kTokens>; ++i) {
      if (first + i < pass.num_pairs) StoreWarpSums<Scalar>(sums[first + i], warp_sums[i]);
    }
    __syncthreads();
    const int num_tokens = min(kReducedTokens<kTokens>, pass.num_pairs - first);
    for (int i = static_cast<int>(threadIdx.x); i < num_tokens * kPairs; i += kThreads) {
      FinishColumns<Scalar, kStage>(params, pass, first + i / kPairs, tile, i % kPairs,
                                    warp_sums[i / kPairs]);
    }
  }
}

template <class Scalar, int kTokens, Stage kStage>
__global__ void __launch_bounds__(kThreads, kTokens == 1 ? 2 : 1)
    ColumnKernel(const __grid_constant__ Params params) {
  extern __shared__ uint4 ring[];
  auto& warp_sums = *reinterpret_cast<WarpSums<Scalar, kTokens>*>(ring + kRingBytes / 16);
  const ColumnLayout<Scalar> layout(params);
  const int grid = static_cast<int>(gridDim.x);
  const int first_unit = static_cast<int>(blockIdx.x);
  WeightStream stream(params, layout, ring, first_unit, grid);
  stream.template Start<kStage>();
  const InputCache input_cache(&warp_sums + 1);

  const int num_units = params.num_passes * layout.num_units();
  for (int unit = first_unit; unit < num_units; unit += grid) {
    const Pass pass = params.passes[unit / layout.num_units()];
    if (unit == first_unit) input_cache.Fill<Scalar>(params, pass);
    const Scalar* inputs[kTokens];
    float sums[kTokens][kChunkElements<Scalar>] = {};
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const int pair = pass.first_pair + (token < pass.num_pairs ? token : 0);
      inputs[token] = static_cast<const Scalar*>(params.input) +
                      static_cast<size_t>(params.input_rows[pair]) * params.num_inputs;
    }
    for (int step = 0; step < layout.num_steps(); ++step) {
      const WeightPair weights = stream.Take();
      if (layout.HasFirst(step)) {
        MultiplyColumns(weights.first, inputs, layout.FirstRow(step), pass.num_pairs, sums);
      }
      if (layout.HasSecond(step)) {
        MultiplyColumns(weights.second, inputs, layout.SecondRow(step), pass.num_pairs, sums);
      }
    }
    ReduceTile<Scalar, kTokens, kStage>(params, pass, unit % layout.num_units(), sums, warp_sums);
  }
}

}  // namespace expertflow::mlp
