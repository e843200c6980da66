#pragma once

#include <cuda_runtime.h>

#include "cuda/predictor/params.h"

namespace expertflow::predictor {

// Where a part of a row of chunks of 16 bytes begins and ends.
struct ChunkRange {
  int begin;
  int end;

  // The part-th of the chunks from `first` on.
  __device__ ChunkRange(int part, const RowSplit& split, int first, int num_chunks)
      : begin(first + part * split.part_chunks), end(min(begin + split.part_chunks, num_chunks)) {}
};

// A warp's part of a row, lane by lane, in registers.
struct RowPart {
  uint4 chunks[kLearnLoads];

  // Starts to load; a row that is not there is all zeros. volatile: the loads stay ahead of what
  // the block does meanwhile.
  __device__ void Load(const uint4* row, const ChunkRange& range, bool is_there) {
#pragma unroll
    for (int i = 0; i < kLearnLoads; ++i) {
      const int at = range.begin + 32 * i + static_cast<int>(threadIdx.x % 32);
      chunks[i] = {0, 0, 0, 0};
      if (!is_there || at >= range.end) continue;
      asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(chunks[i].x), "=r"(chunks[i].y), "=r"(chunks[i].z), "=r"(chunks[i].w)
                   : "l"(__cvta_generic_to_global(row + at)));
    }
  }
};

}  // namespace expertflow::predictor
