#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "cuda/expert_mlp/elements.h"
#include "cuda/expert_mlp/params.h"
#include "cuda/expert_mlp/result.h"
#include "cuda/expert_mlp/weight_stream.h"

// Matrices [inputs, outputs], ExpertMlpKind::kGptOss. A unit is 128 bytes of columns, reduced by
// one block: a thread owns a chunk of columns and two of 64 rows. Narrower units would read less
// than HBM likes at a time, wider ones keep fewer multiprocessors busy.

namespace expertflow::mlp {

constexpr int kTileChunks = 8;
constexpr int kStepRows = 2 * kThreads / kTileChunks;

template <class Scalar>
constexpr int kTileColumns = kTileChunks * kChunkElements<Scalar>;

// A step is rows 2r and 2r + 1 of each thread. Where the last tile leaves the matrix, threads load
// its last columns once more, for nothing.
template <class Scalar>
class ColumnLayout {
 public:
  __device__ explicit ColumnLayout(const Params& params)
      : num_rows_(params.num_inputs),
        row_chunks_(params.num_outputs / kChunkElements<Scalar>),
        row_in_step_(static_cast<int>(threadIdx.x) / kTileChunks * 2),
        chunk_in_tile_(static_cast<int>(threadIdx.x) % kTileChunks) {}

  __device__ int num_units() const { return (row_chunks_ + kTileChunks - 1) / kTileChunks; }
  __device__ int num_steps() const { return (num_rows_ + kStepRows - 1) / kStepRows; }
  __device__ int FirstRow(int step) const { return step * kStepRows + row_in_step_; }
  // Both rows: their number is even.
  __device__ bool Has(int step) const { return FirstRow(step) < num_rows_; }
  __device__ size_t step_bytes() const { return kStepRows * row_bytes(); }
  __device__ size_t second_bytes() const { return row_bytes(); }
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

// Inputs 2r and 2r + 1 of a token, as they are in memory: to take them apart at once would wait for
// the load.
template <class Scalar>
struct alignas(2 * sizeof(Scalar)) InputPair {
  unsigned words[sizeof(Scalar) / 2];

  __device__ float2 Unpack() const {
    float values[2];
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(Scalar));
#pragma unroll
    for (int i = 0; i < 2 / kPerWord; ++i) UnpackWord(words[i], Scalar(), values + i * kPerWord);
    return {values[0], values[1]};
  }
};

// How many steps before their use a thread loads its inputs. The first unit of a block finds them
// in the L2 cache only, which takes as long as a step's weights while HBM is busy.
template <int kTokens>
constexpr int kStepsAhead = kTokens == 1 ? 2 : 1;

// The inputs of a thread's rows, for each token of a pass.
template <class Scalar, int kTokens>
class ColumnInputs {
 public:
  __device__ ColumnInputs(const Params& params, const Pass& pass,
                          const ColumnLayout<Scalar>& layout)
      : layout_(layout) {
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const int pair = pass.first_pair + (token < pass.num_pairs ? token : 0);
      rows_[token] = static_cast<const Scalar*>(params.input) +
                     static_cast<size_t>(params.input_rows[pair]) * params.num_inputs;
    }
  }

  __device__ void Load(int step, InputPair<Scalar> (&inputs)[kTokens]) const {
    if (!layout_.Has(step)) return;
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      inputs[token] =
          *reinterpret_cast<const InputPair<Scalar>*>(rows_[token] + layout_.FirstRow(step));
    }
  }

 private:
  const ColumnLayout<Scalar>& layout_;
  const Scalar* rows_[kTokens];
};

// Adds one step's rows, for each token of the pass.
template <class Scalar, int kTokens>
__device__ void MultiplyColumns(const WeightPair& weights,
                                const InputPair<Scalar> (&inputs)[kTokens], int num_tokens,
                                float (&sums)[kTokens][kChunkElements<Scalar>]) {
  float first[kChunkElements<Scalar>];
  float second[kChunkElements<Scalar>];
  Unpack<Scalar>(weights.first, first);
  Unpack<Scalar>(weights.second, second);
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    if (token >= num_tokens) break;
    const float2 x = inputs[token].Unpack();
#pragma unroll
    for (int i = 0; i < kChunkElements<Scalar>; ++i) {
      sums[token][i] = __fmaf_rn(second[i], x.y, __fmaf_rn(first[i], x.x, sums[token][i]));
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
  stream.Start();

  const int num_units = params.num_passes * layout.num_units();
  for (int unit = first_unit; unit < num_units; unit += grid) {
    const Pass pass = params.passes[unit / layout.num_units()];
    const ColumnInputs<Scalar, kTokens> inputs(params, pass, layout);
    InputPair<Scalar> ahead[kStepsAhead<kTokens>][kTokens];
    float sums[kTokens][kChunkElements<Scalar>] = {};
#pragma unroll
    for (int i = 0; i < kStepsAhead<kTokens>; ++i) inputs.Load(i, ahead[i]);
    for (int first_step = 0; first_step < layout.num_steps(); first_step += kStepsAhead<kTokens>) {
#pragma unroll
      for (int i = 0; i < kStepsAhead<kTokens>; ++i) {
        const int step = first_step + i;
        if (step >= layout.num_steps()) break;
        const WeightPair weights = stream.Take();
        if (!layout.Has(step)) continue;
        MultiplyColumns<Scalar>(weights, ahead[i], pass.num_pairs, sums);
        inputs.Load(step + kStepsAhead<kTokens>, ahead[i]);
      }
    }
    ReduceTile<Scalar, kTokens, kStage>(params, pass, unit % layout.num_units(), sums, warp_sums);
  }
}

}  // namespace expertflow::mlp
