#pragma once

#include <cuda_runtime.h>

#include "cuda/expert_mlp/elements.h"
#include "cuda/predictor/params.h"

namespace expertflow::predictor {

// Where a part of a row of chunks of 16 bytes begins and ends.
struct ChunkRange {
  int begin;
  int end;

  __device__ ChunkRange(int part, int part_chunks, int num_chunks)
      : begin(part * part_chunks), end(min(begin + part_chunks, num_chunks)) {}
};

// A warp's part of a row, lane by lane, in registers.
struct RowPart {
  uint4 chunks[kMaxLoads];

  // Starts to load; a row that is not there is all zeros. volatile: the loads stay ahead of what
  // the block does meanwhile.
  __device__ void Load(const uint4* row, const ChunkRange& range, bool is_there) {
#pragma unroll
    for (int i = 0; i < kMaxLoads; ++i) LoadChunk(i, row, range, is_there);
  }

  // The lane's share of the product with x, whose first element belongs to the part's first. Loads
  // the part of `next` meanwhile, each chunk as soon as there is room for it.
  template <class Scalar>
  __device__ float DotAndLoad(const float* x, const ChunkRange& range, const uint4* next,
                              bool is_next_there) {
    constexpr int kElements = mlp::kChunkElements<Scalar>;
    const int lane = static_cast<int>(threadIdx.x % 32);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kMaxLoads; ++i) {
      if (range.begin + 32 * i + lane >= range.end) continue;
      float values[kElements];
      mlp::Unpack<Scalar>(chunks[i], values);
      const float* from = x + (32 * i + lane) * kElements;
#pragma unroll
      for (int j = 0; j < kElements; ++j) sum = fmaf(values[j], from[j], sum);
      LoadChunk(i, next, range, is_next_there);
    }
    return sum;
  }

 private:
  __device__ void LoadChunk(int i, const uint4* row, const ChunkRange& range, bool is_there) {
    const int at = range.begin + 32 * i + static_cast<int>(threadIdx.x % 32);
    chunks[i] = {0, 0, 0, 0};
    if (!is_there || at >= range.end) return;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(chunks[i].x), "=r"(chunks[i].y), "=r"(chunks[i].z), "=r"(chunks[i].w)
                 : "l"(__cvta_generic_to_global(row + at)));
  }
};

}  // namespace expertflow::predictor
