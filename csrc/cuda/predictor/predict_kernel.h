#pragma once

#include "cuda/grid_dependency.h"
#include "cuda/predictor/features.h"
#include "cuda/predictor/row_part.h"
#include "cuda/predictor/summary.h"

// One pass over the weights: a block takes the same part of the rows of kWarps experts, a warp
// each, and the block that ends last for a distance makes scores and needs of the sums. Distance 0
// is the layer itself: how it routes, from which the update learns.

namespace expertflow::predictor {

// What a block does: the part-th part of the rows of a group of experts, weights first, then
// routers.
struct PredictWork {
  int distance;
  int part;
  int group;
  int num_blocks;  // of this distance

  __device__ PredictWork(const PredictParams& params, int block) {
    const int num_groups = NumGroups(params.view);
    const int num_own = num_groups * NumParts(params.split, 0);
    num_blocks = num_own;
    distance = 0;
    if (block >= num_own) {
      num_blocks = num_groups * NumParts(params.split, 1);
      distance = 1 + (block - num_own) / num_blocks;
      block = (block - num_own) % num_blocks;
    }
    const int num_parts = NumParts(params.split, distance);
    part = block % num_parts;
    group = block / num_parts;
  }
};

struct PredictShared {
  alignas(16) float x[kMaxLoads * 32 * 8];  // a part's features, of at most 8 elements a chunk
  SumScratch sums;
  SummaryShared summary;
  unsigned ticket;
};

// A part of a row, how many parts it has, and of how many elements it is.
template <class Scalar>
__device__ Features SumPart(const PredictParams& params, PredictShared& shared,
                            const PredictWork& work, const Scalar* row, int part, int num_parts,
                            int num_columns) {
  constexpr int kElements = mlp::kChunkElements<Scalar>;
  const int expert = work.group * kWarps + static_cast<int>(threadIdx.x / 32);
  const bool is_expert = expert < params.view.rule.num_experts;
  const ChunkRange range(part, num_parts, num_columns / kElements);
  RowPart weights;
  weights.Load(reinterpret_cast<const uint4*>(row + size_t(expert) * size_t(num_columns)), range,
               is_expert);
  const Features features(params, shared.sums);
  const int target = params.layer + work.distance;
  const int first = range.begin * kElements;
  const int count = (range.end - range.begin) * kElements;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    shared.x[i] = features(target, first + i);
  }
  __syncthreads();
  const float sum = WarpSum(weights.Dot<Scalar>(shared.x, range));
  if (threadIdx.x % 32 == 0 && is_expert) {
    params.view.partial[PartialRow(params, work.distance, work.part) + size_t(expert)] = sum;
  }
  return features;
}

template <class RouterScalar>
__device__ Features SumPartOf(const PredictParams& params, PredictShared& shared,
                              const PredictWork& work) {
  const View& view = params.view;
  const auto num_experts = static_cast<size_t>(view.rule.num_experts);
  const int num_weight_parts = work.distance > 0 ? params.split.weight_parts : 0;
  if (work.part < num_weight_parts) {
    const auto pair = static_cast<size_t>(params.first_pair + work.distance - 1);
    return SumPart(params, shared, work,
                   view.weights + pair * num_experts * static_cast<size_t>(view.num_features),
                   work.part, num_weight_parts, view.num_features);
  }
  const auto target = static_cast<size_t>(params.layer + work.distance);
  return SumPart(params, shared, work,
                 static_cast<const RouterScalar*>(view.routers) +
                     target * num_experts * static_cast<size_t>(view.hidden),
                 work.part - num_weight_parts, params.split.router_parts, view.hidden);
}

// Whether this block is the last of `num_blocks` to come here: then it sees what all wrote before.
// The ticket is back at 0 afterwards.
__device__ inline bool IsLast(uint32_t* ticket, int num_blocks, unsigned& shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    shared = atomicInc(ticket, static_cast<unsigned>(num_blocks - 1));
    __threadfence();
  }
  __syncthreads();
  return shared == static_cast<unsigned>(num_blocks - 1);
}

template <class RouterScalar>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    PredictKernel(const __grid_constant__ PredictParams params) {
  __shared__ PredictShared shared;
  WaitForPrerequisites();
  LetDependentsStart();
  const PredictWork work(params, static_cast<int>(blockIdx.x));
  const Features features = SumPartOf<RouterScalar>(params, shared, work);
  if (!IsLast(params.view.tickets + work.distance, work.num_blocks, shared.ticket)) return;
  const Summary summary(params, shared.summary, features, work.distance);
  if (work.distance == 0) {
    summary.SetTargets();
    summary.KeepInputs();
  } else {
    summary.Foresee();
  }
}

}  // namespace expertflow::predictor
