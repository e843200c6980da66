#pragma once

#include "cuda/grid_dependency.h"
#include "cuda/predictor/features.h"
#include "cuda/predictor/keep_inputs.h"
#include "cuda/predictor/part_sums.h"
#include "cuda/predictor/summary.h"

// One pass over the weights: a block takes the same part of the rows of some groups of kWarps
// experts, a warp each, and the block that ends last for a distance makes scores and needs of the
// sums. Distance 0 is the layer itself: how it routes, from which the update learns.

namespace expertflow::predictor {

union PredictShared {
  PartRing ring;
  KeepShared keep;
  SummaryShared summary;
};

// Blocks are [1 + parts of all distances, blocks that share the groups of experts]. The first row
// of blocks has one that keeps what the update needs.
struct PredictWork {
  int distance;
  int part;  // of the distance
  int first_group;
  int end_group;

  __device__ static bool IsKeeperRow() { return blockIdx.y == 0; }

  __device__ explicit PredictWork(const PredictParams& params)
      : distance(0), part(static_cast<int>(blockIdx.y) - 1) {
    const int num_own = params.NumOwnParts();
    if (part >= num_own) {
      const int num_parts = params.split.NumParts(1);
      distance = 1 + (part - num_own) / num_parts;
      part = (part - num_own) % num_parts;
    }
    const int num_groups = NumGroups(params.view);
    const auto block = static_cast<int>(blockIdx.x), num_blocks = static_cast<int>(gridDim.x);
    first_group = block * num_groups / num_blocks;
    end_group = (block + 1) * num_groups / num_blocks;
  }
};

template <class RouterScalar>
__device__ void SumRouters(const PredictParams& params, PartRing& ring, const PredictWork& work) {
  const View& view = params.view;
  const int num_chunks = view.hidden / mlp::kChunkElements<RouterScalar>;
  const size_t first_row = static_cast<size_t>(params.layer + work.distance) *
                           static_cast<size_t>(view.rule.num_experts);
  const PartSums<RouterScalar> sums(
      ring,
      {.rows = static_cast<const uint4*>(view.routers) + first_row * size_t(num_chunks),
       .num_chunks = num_chunks,
       .range = ChunkRange(work.part, params.split.routers, 0, num_chunks)},
      view.rule.num_experts, work.first_group, work.end_group);
  sums.Start();
  WaitForPrerequisites();
  LetDependentsStart();
  int at[sums.kNumFours];
  float4 x[sums.kNumFours];
  sums.FindFours(at);
  Features(params).LoadHidden(at, x);
  if (work.first_group == 0 && threadIdx.x < 32) {
    float power = 0;
    for (const float4& four : x) power += Power(four);
    power = WarpSum(power);
    if (threadIdx.x == 0) PowersOf(params, work.distance)[work.part] = power;
  }
  sums.Sum(x, PartialOf(params, work.distance, work.part));
}

__device__ inline void SumWeights(const PredictParams& params, PartRing& ring,
                                  const PredictWork& work) {
  const View& view = params.view;
  const PredictSplit& split = params.split;
  constexpr int kElements = mlp::kChunkElements<float>;
  const int num_chunks = view.num_features / kElements;
  const int first_rest = view.hidden / kElements;
  const int part = work.part - split.routers.num_parts;
  const bool is_direction = part < split.directions.num_parts;
  const size_t first_row = static_cast<size_t>(params.first_pair + work.distance - 1) *
                           static_cast<size_t>(view.rule.num_experts);
  const PartSums<float> sums(
      ring,
      {.rows = reinterpret_cast<const uint4*>(view.weights) + first_row * size_t(num_chunks),
       .num_chunks = num_chunks,
       .range = is_direction ? ChunkRange(part, split.directions, 0, first_rest)
                             : ChunkRange(part - split.directions.num_parts, split.rest, first_rest,
                                          num_chunks)},
      view.rule.num_experts, work.first_group, work.end_group);
  const Features features(params);
  const int target = params.layer + work.distance;
  int at[sums.kNumFours];
  float4 x[sums.kNumFours];
  sums.FindFours(at);
  if (!is_direction && threadIdx.x < 32) features.PrefetchRest(target, at);
  sums.Start();
  WaitForPrerequisites();
  LetDependentsStart();
  if (is_direction) {
    features.LoadHidden(at, x);
  } else {
    features.LoadRest(target, at, x);
  }
  sums.Sum(x, PartialOf(params, work.distance, work.part));
}

// Whether this block is the last of `num_blocks` to come here: then it sees what all wrote before.
// The ticket is back at 0 afterwards.
__device__ inline bool IsLast(uint32_t* ticket, unsigned num_blocks, unsigned& shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(shared)
                 : "l"(__cvta_generic_to_global(ticket)), "r"(num_blocks - 1)
                 : "memory");
  }
  __syncthreads();
  return shared == num_blocks - 1;
}

template <class RouterScalar>
__global__ void __launch_bounds__(kThreads, kPredictBlocksPerMultiprocessor)
    PredictKernel(const __grid_constant__ PredictParams params) {
  __shared__ PredictShared shared;
  __shared__ unsigned ticket;
  if (PredictWork::IsKeeperRow()) {
    WaitForPrerequisites();
    LetDependentsStart();
    if (blockIdx.x == 0) KeepBlock(params, shared.keep).Keep();
    return;
  }
  const PredictWork work(params);
  if (work.part < params.split.routers.num_parts) {
    SumRouters<RouterScalar>(params, shared.ring, work);
  } else {
    SumWeights(params, shared.ring, work);
  }
  const unsigned num_blocks = gridDim.x * unsigned(params.split.NumParts(work.distance));
  if (!IsLast(params.view.tickets + work.distance, num_blocks, ticket)) return;
  const Summary summary(params, shared.summary, work.distance);
  if (work.distance == 0) {
    summary.SetTargets();
  } else {
    summary.Foresee();
  }
}

}  // namespace expertflow::predictor
