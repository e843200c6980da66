#pragma once

#include "cuda/grid_dependency.h"
#include "cuda/predictor/features.h"
#include "cuda/predictor/row_part.h"
#include "cuda/predictor/summary.h"

// One pass over the weights: a block takes the same part of the rows of some groups of kWarps
// experts, a warp each, and the block that ends last for a distance makes scores and needs of the
// sums. Distance 0 is the layer itself: how it routes, from which the update learns.

namespace expertflow::predictor {

struct PredictShared {
  alignas(16) float x[kMaxLoads * 32 * 8];  // a part's features, of at most 8 elements a chunk
  SumScratch sums;
  SummaryShared summary;
  unsigned ticket;
};

// Blocks are [distances, blocks of groups, parts], the weights' parts before the routers'. The
// last distance is 0, which has no weights.
struct PredictWork {
  int distance;
  int first_group;
  int end_group;
  int part;
  bool is_there;

  __device__ explicit PredictWork(const PredictParams& params) {
    const auto plane = static_cast<int>(blockIdx.z);
    distance = plane < params.num_distances ? plane + 1 : 0;
    first_group = static_cast<int>(blockIdx.y) * params.split.groups_per_block;
    end_group = min(first_group + params.split.groups_per_block, NumGroups(params.view));
    part = static_cast<int>(blockIdx.x);
    is_there = part < NumParts(params.split, distance);
  }
};

// A part of the rows of groups of experts, `matrix` [experts, num_chunks of 16 bytes].
template <class Scalar>
__device__ float SumPart(const PredictParams& params, PredictShared& shared,
                         const PredictWork& work, Features& features, const void* matrix,
                         int num_chunks, const ChunkRange& range) {
  constexpr int kFours = mlp::kChunkElements<Scalar> / 4;
  const auto thread = static_cast<int>(threadIdx.x);
  const auto expert_of = [&](int group) { return group * kWarps + thread / 32; };
  const auto is_expert = [&](int group) {
    return group < work.end_group && expert_of(group) < params.view.rule.num_experts;
  };
  const auto row_of = [&](int group) {
    return static_cast<const uint4*>(matrix) + size_t(expert_of(group)) * size_t(num_chunks);
  };
  RowPart weights;
  weights.Load(row_of(work.first_group), range, is_expert(work.first_group));
  const int target = params.layer + work.distance;
  const int first = range.begin * kFours, count = (range.end - range.begin) * kFours;
  const int num_directions = params.view.hidden / 4;
  auto* x = reinterpret_cast<float4*>(shared.x);
  for (int i = thread; i < count; i += kThreads) x[i] = features.Raw4(target, 4 * (first + i));
  const float length = features.MeasureLength(shared.sums);
  for (int i = thread; i < count && first + i < num_directions; i += kThreads) {
    x[i] = features.ToDirection(x[i]);
  }
  __syncthreads();
  float* sums = params.view.partial + PartialRow(params, work.distance, work.part);
#pragma unroll 1
  for (int group = work.first_group; group < work.end_group; ++group) {
    const float sum = WarpSum(
        weights.DotAndLoad<Scalar>(shared.x, range, row_of(group + 1), is_expert(group + 1)));
    if (thread % 32 == 0 && is_expert(group)) sums[expert_of(group)] = sum;
  }
  return length;
}

// Returns the length of the router input.
template <class RouterScalar>
__device__ float SumPartOf(const PredictParams& params, PredictShared& shared,
                           const PredictWork& work, Features& features) {
  const View& view = params.view;
  const Split& split = params.split;
  const auto num_experts = static_cast<size_t>(view.rule.num_experts);
  const int num_weight_parts = work.distance > 0 ? split.weight_parts : 0;
  if (work.part < num_weight_parts) {
    const int num_chunks = view.num_features / mlp::kChunkElements<float>;
    const auto pair = static_cast<size_t>(params.first_pair + work.distance - 1);
    return SumPart<float>(params, shared, work, features,
                          view.weights + pair * num_experts * size_t(view.num_features), num_chunks,
                          ChunkRange(work.part, split.weight_part_chunks, num_chunks));
  }
  const int num_chunks = view.hidden / mlp::kChunkElements<RouterScalar>;
  const auto target = static_cast<size_t>(params.layer + work.distance);
  return SumPart<RouterScalar>(
      params, shared, work, features,
      static_cast<const RouterScalar*>(view.routers) + target * num_experts * size_t(view.hidden),
      num_chunks, ChunkRange(work.part - num_weight_parts, split.router_part_chunks, num_chunks));
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
  const PredictWork work(params);
  if (!work.is_there) return;
  Features features(params);
  if (work.distance == 0 && params.layer < 0) {  // an embedding routes nothing
    if (work.part > 0 || work.first_group > 0) return;
    const float length = features.MeasureLength(shared.sums);
    Summary(params, shared.summary, features, length, 0).KeepInputs();
    return;
  }
  const float length = SumPartOf<RouterScalar>(params, shared, work, features);
  const int num_blocks =
      NumGroupBlocks(params.view, params.split) * NumParts(params.split, work.distance);
  if (!IsLast(params.view.tickets + work.distance, num_blocks, shared.ticket)) return;
  const Summary summary(params, shared.summary, features, length, work.distance);
  if (work.distance == 0) {
    summary.SetTargets();
    summary.KeepInputs();
  } else {
    summary.Foresee();
  }
}

}  // namespace expertflow::predictor
