#include "cuda/predictor_kernel.h"

#include <cuda_runtime.h>

#include "cuda/cuda_error.h"
#include "cuda/grid_dependency.h"
#include "cuda/overlapped_launch.h"
#include "cuda/predictor/learn_kernel.h"
#include "cuda/predictor/predict_kernel.h"

namespace expertflow {
namespace {

using namespace predictor;

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    LearnKernel(const __grid_constant__ LearnParams params) {
  __shared__ LearnShared shared;
  WaitForPrerequisites();
  LetDependentsStart();
  const LearnBlock work(params, shared);
  const int block = static_cast<int>(blockIdx.x);
  if (block < params.num_pairs) {
    work.UpdateScalars(block);
  } else if (block == params.num_pairs) {
    work.Remember();
  } else {
    work.UpdateWeights(block - params.num_pairs - 1);
  }
}

int32_t DivideUp(int32_t value, int32_t divisor) { return (value + divisor - 1) / divisor; }

// So that a warp's part of a row is at most `num_loads` loads for each lane.
Split SplitBy(int32_t num_loads, const View& view, DType router_dtype) {
  constexpr int32_t kChunkBytes = 16;
  const int32_t weight_chunks = view.num_features * int32_t{sizeof(float)} / kChunkBytes;
  const int32_t router_chunks =
      view.hidden * static_cast<int32_t>(ElementBytes(router_dtype)) / kChunkBytes;
  const int32_t weight_parts = DivideUp(weight_chunks, 32 * num_loads);
  const int32_t router_parts = DivideUp(router_chunks, 32 * num_loads);
  return {.weight_parts = weight_parts,
          .weight_part_chunks = DivideUp(weight_chunks, weight_parts),
          .router_parts = router_parts,
          .router_part_chunks = DivideUp(router_chunks, router_parts)};
}

// The smallest parts with which all blocks run at once, so that every load is under way at the
// same time; the largest parts if they never do.
template <class NumBlocks>
Split ChooseSplit(const View& view, const PredictorLaunch& launch, NumBlocks num_blocks) {
  int32_t num_loads = 1;
  while (num_loads < kMaxLoads &&
         num_blocks(SplitBy(num_loads, view, launch.router_dtype)) > launch.num_resident_blocks) {
    ++num_loads;
  }
  return SplitBy(num_loads, view, launch.router_dtype);
}

void Launch(const void* kernel, dim3 num_blocks, void* params, cudaStream_t stream) {
  void* arguments[] = {params};
  LaunchOverlapped(
      {.kernel = kernel, .num_blocks = num_blocks, .num_threads = kThreads, .shared_bytes = 0},
      arguments, stream);
}

const void* PredictKernelFor(DType router_dtype) {
  switch (router_dtype) {
    case DType::kFloat32:
      return reinterpret_cast<const void*>(&PredictKernel<float>);
    case DType::kBFloat16:
      return reinterpret_cast<const void*>(&PredictKernel<__nv_bfloat16>);
    case DType::kFloat16:
      return reinterpret_cast<const void*>(&PredictKernel<__half>);
  }
  return nullptr;
}

}  // namespace

PredictorLaunch PreparePredictor(DType router_dtype) {
  int device;
  int num_multiprocessors;
  EXPERTFLOW_CUDA_CHECK(cudaGetDevice(&device));
  EXPERTFLOW_CUDA_CHECK(
      cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return {.router_dtype = router_dtype,
          .num_resident_blocks = num_multiprocessors * kBlocksPerMultiprocessor};
}

void LaunchPredict(PredictParams params, const PredictorLaunch& launch, cudaStream_t stream) {
  const auto num_blocks = [&](const Split& split) {
    return NumGroupBlocks(params.view, split) *
           (NumParts(split, 0) + params.num_distances * NumParts(split, 1));
  };
  params.split = ChooseSplit(params.view, launch, num_blocks);
  // Blocks that have to wait for others would have nothing under way meanwhile.
  while (num_blocks(params.split) > launch.num_resident_blocks &&
         params.split.groups_per_block < NumGroups(params.view)) {
    ++params.split.groups_per_block;
  }
  const dim3 blocks(static_cast<unsigned>(NumParts(params.split, 1)),
                    static_cast<unsigned>(NumGroupBlocks(params.view, params.split)),
                    static_cast<unsigned>(params.num_distances) + 1);
  Launch(PredictKernelFor(launch.router_dtype), blocks, &params, stream);
}

void LaunchLearn(LearnParams params, const PredictorLaunch& launch, cudaStream_t stream) {
  const auto num_blocks = [&](const Split& split) {
    return params.num_pairs + 1 + params.num_pairs * NumGroups(params.view) * split.weight_parts;
  };
  params.split = ChooseSplit(params.view, launch, num_blocks);
  Launch(reinterpret_cast<const void*>(&LearnKernel),
         static_cast<unsigned>(num_blocks(params.split)), &params, stream);
}

int32_t MaxPredictorParts(const View& view, DType router_dtype) {
  const Split split = SplitBy(1, view, router_dtype);
  return split.weight_parts + split.router_parts;
}

}  // namespace expertflow
