#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "cuda/expert_mlp/elements.h"
#include "cuda/expert_mlp/params.h"
#include "cuda/expert_mlp/result.h"
#include "cuda/expert_mlp/weight_stream.h"

// Matrices [inputs, outputs], ExpertMlpKind::kGptOss. A unit is a tile of columns, reduced by one
// block: a thread owns a chunk of columns and two of every kStepRows rows.

namespace expertflow::mlp {

// A step is rows 2r and 2r + 1 of each thread. Where the last tile leaves the matrix, threads load
// its last columns once more, for nothing.
//
// Three blocks on each multiprocessor and tiles of 128 and 64 bytes: gpt-oss' four experts are then
// 360 units in both stages, for 396 places on an H100 or H200. Narrower tiles would read less than
// HBM likes at a time, wider ones leave multiprocessors idle.
template <class ScalarType, Stage kStage>
class ColumnLayout {
 public:
  using Scalar = ScalarType;
  static constexpr int kThreads = 320;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kDepth = 3;
  static constexpr int kTileChunks = kStage == Stage::kGateUp ? 8 : 4;
  static constexpr int kTileColumns = kTileChunks * kChunkElements<Scalar>;
  static constexpr int kTilePairs = kTileColumns / 2;
  static constexpr int kStepRows = 2 * kThreads / kTileChunks;

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

// Two neighbouring elements as they are in memory: to take them apart at once would wait for the
// load.
template <class Scalar>
struct alignas(2 * sizeof(Scalar)) ElementPair {
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
template <class Layout, int kTokens>
class ColumnInputs {
 public:
  using Scalar = typename Layout::Scalar;

  __device__ ColumnInputs(const Params& params, const Pass& pass, const Layout& layout)
      : layout_(layout) {
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const int pair = pass.first_pair + (token < pass.num_pairs ? token : 0);
      rows_[token] = static_cast<const Scalar*>(params.input) +
                     static_cast<size_t>(params.input_rows[pair]) * params.num_inputs;
    }
  }

  __device__ void Load(int step, ElementPair<Scalar> (&inputs)[kTokens]) const {
    if (!layout_.Has(step)) return;
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      inputs[token] =
          *reinterpret_cast<const ElementPair<Scalar>*>(rows_[token] + layout_.FirstRow(step));
    }
  }

 private:
  const Layout& layout_;
  const Scalar* rows_[kTokens];
};

// Adds one step's rows, for each token of the pass.
template <class Scalar, int kTokens>
__device__ void MultiplyColumns(const WeightPair& weights,
                                const ElementPair<Scalar> (&inputs)[kTokens], int num_tokens,
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

// The bias of the two columns that a thread finishes, loaded long before.
template <class Layout>
__device__ ElementPair<typename Layout::Scalar> LoadBias(const Params& params, const Pass& pass,
                                                         int tile) {
  const auto* bias = reinterpret_cast<const ElementPair<typename Layout::Scalar>*>(
      params.bias + static_cast<size_t>(pass.slot) * params.slot_stride_bytes);
  const int pair = tile * Layout::kTilePairs + static_cast<int>(threadIdx.x) % Layout::kTilePairs;
  return bias[min(pair, params.num_outputs / 2 - 1)];
}

// Sums of a token in a block's warps, before they are added up.
template <class Layout>
using WarpSums = float[Layout::kWarps][Layout::kTileColumns];

// Adds up over the lanes of a warp that have the same columns.
template <class Layout>
__device__ void StoreWarpSums(const float (&sums)[kChunkElements<typename Layout::Scalar>],
                              WarpSums<Layout>& warp_sums) {
  constexpr int kElements = kChunkElements<typename Layout::Scalar>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    float sum = sums[i];
#pragma unroll
    for (int offset = 16; offset >= Layout::kTileChunks; offset /= 2) {
      sum = __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFU, sum, offset));
    }
    if (lane < Layout::kTileChunks) warp_sums[threadIdx.x / 32][lane * kElements + i] = sum;
  }
}

// Adds up the warps in their order and finishes columns 2i and 2i + 1 of `tile`.
template <class Layout, Stage kStage>
__device__ void FinishColumns(const Params& params, const Pass& pass, int pair_in_pass, int tile,
                              int i, const float2& bias, const WarpSums<Layout>& warp_sums) {
  const int pair = tile * Layout::kTilePairs + i;
  if (pair >= params.num_outputs / 2) return;
  float2 total = {0, 0};
#pragma unroll
  for (int warp = 0; warp < Layout::kWarps; ++warp) {
    const float2 sum = *reinterpret_cast<const float2*>(&warp_sums[warp][2 * i]);
    total.x = __fadd_rn(total.x, sum.x);
    total.y = __fadd_rn(total.y, sum.y);
  }
  WriteResult<typename Layout::Scalar, ExpertMlpKind::kGptOss, kStage>(
      params, pass, pair_in_pass, pair, __fadd_rn(total.x, bias.x), __fadd_rn(total.y, bias.y));
}

// Adds up over the rows. Every thread finishes two columns of one token, or nothing.
template <class Layout, int kTokens, Stage kStage>
__device__ void ReduceTile(const Params& params, const Pass& pass, int tile,
                           const ElementPair<typename Layout::Scalar>& bias,
                           const float (&sums)[kTokens][kChunkElements<typename Layout::Scalar>],
                           WarpSums<Layout>* warp_sums) {
  constexpr int kPairs = Layout::kTilePairs;
  static_assert(kTokens * kPairs <= Layout::kThreads);
  __syncthreads();  // what the last tile left there has been read
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    if (token < pass.num_pairs) StoreWarpSums<Layout>(sums[token], warp_sums[token]);
  }
  __syncthreads();
  const int token = static_cast<int>(threadIdx.x) / kPairs;
  if (token >= pass.num_pairs) return;
  FinishColumns<Layout, kStage>(params, pass, token, tile, static_cast<int>(threadIdx.x) % kPairs,
                                bias.Unpack(), warp_sums[token]);
}

template <class Scalar, int kTokens, Stage kStage>
__global__ void __launch_bounds__(ColumnLayout<Scalar, kStage>::kThreads,
                                  kTokens == 1 ? 3 : (kTokens <= 4 ? 2 : 1))
    ColumnKernel(const __grid_constant__ Params params) {
  using Layout = ColumnLayout<Scalar, kStage>;
  extern __shared__ uint4 ring[];
  auto* warp_sums = reinterpret_cast<WarpSums<Layout>*>(ring + kRingBytes<Layout> / 16);
  const Layout layout(params);
  const int grid = static_cast<int>(gridDim.x);
  const int first_unit = static_cast<int>(blockIdx.x);
  WeightStream stream(params, layout, ring, first_unit, grid);
  stream.Start();

  const int num_units = params.num_passes * layout.num_units();
  for (int unit = first_unit; unit < num_units; unit += grid) {
    const Pass pass = params.passes[unit / layout.num_units()];
    const int tile = unit % layout.num_units();
    const ElementPair<Scalar> bias = LoadBias<Layout>(params, pass, tile);
    const ColumnInputs<Layout, kTokens> inputs(params, pass, layout);
    ElementPair<Scalar> ahead[kStepsAhead<kTokens>][kTokens];
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
    ReduceTile<Layout, kTokens, kStage>(params, pass, tile, bias, sums, warp_sums);
  }
}

// For both stages.
template <class Scalar, int kTokens>
constexpr size_t kColumnSharedBytes =
    kRingBytes<ColumnLayout<Scalar, Stage::kGateUp>> +
    kTokens * sizeof(WarpSums<ColumnLayout<Scalar, Stage::kGateUp>>);

}  // namespace expertflow::mlp
