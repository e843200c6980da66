#include "cuda/predictor_kernel.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/cuda_error.h"
#include "cuda/grid_dependency.h"
#include "cuda/overlapped_launch.h"
#include "cuda/predictor/learn_kernel.h"
#include "cuda/predictor/predict_kernel.h"

namespace expertflow {
namespace {

using namespace predictor;

__global__ void __launch_bounds__(kThreads, kLearnBlocksPerMultiprocessor)
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

// Parts that are at most `num_loads` loads for each lane of a warp.
RowSplit SplitBy(int32_t num_loads, int32_t num_chunks) {
  const int32_t num_parts = DivideUp(num_chunks, 32 * num_loads);
  return {.num_parts = num_parts, .part_chunks = DivideUp(num_chunks, num_parts)};
}

int32_t NumChunks(int32_t num_elements, size_t element_bytes) {
  constexpr int32_t kChunkBytes = 16;
  return num_elements * static_cast<int32_t>(element_bytes) / kChunkBytes;
}

PredictSplit SplitPrediction(const View& view, DType router_dtype) {
  const auto split = [](int32_t num_elements, size_t element_bytes) {
    return SplitBy(kPredictLoads, NumChunks(num_elements, element_bytes));
  };
  return {.routers = split(view.hidden, ElementBytes(router_dtype)),
          .directions = split(view.hidden, sizeof(float)),
          .rest = split(view.num_features - view.hidden, sizeof(float))};
}

void Launch(const void* kernel, dim3 num_blocks, bool may_start_early, void* params,
            cudaStream_t stream) {
  void* arguments[] = {params};
  LaunchOverlapped({.kernel = kernel,
                    .num_blocks = num_blocks,
                    .num_threads = kThreads,
                    .shared_bytes = 0,
                    .may_start_early = may_start_early},
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

// How many run at once on the device that is current.
int32_t NumResidentBlocks(const void* kernel) {
  int device, num_multiprocessors, blocks_per_multiprocessor;
  EXPERTFLOW_CUDA_CHECK(cudaGetDevice(&device));
  EXPERTFLOW_CUDA_CHECK(
      cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device));
  EXPERTFLOW_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_multiprocessor,
                                                                      kernel, kThreads, 0));
  return num_multiprocessors * blocks_per_multiprocessor;
}

}  // namespace

PredictorLaunch PreparePredictor(DType router_dtype) {
  return {.router_dtype = router_dtype,
          .num_predict_blocks = NumResidentBlocks(PredictKernelFor(router_dtype)),
          .num_learn_blocks = NumResidentBlocks(reinterpret_cast<const void*>(&LearnKernel))};
}

// All blocks run at once, if they can, and share the groups of experts evenly: one that waits for
// others to end would have nothing under way meanwhile.
void LaunchPredict(PredictParams params, const PredictorLaunch& launch, bool may_start_early,
                   cudaStream_t stream) {
  params.split = SplitPrediction(params.view, launch.router_dtype);
  const int32_t num_parts = params.NumOwnParts() + params.num_distances * params.split.NumParts(1);
  const int32_t blocks_per_part =
      std::clamp(launch.num_predict_blocks / (num_parts + 1), 1, NumGroups(params.view));
  const dim3 blocks(static_cast<unsigned>(blocks_per_part), static_cast<unsigned>(num_parts) + 1);
  Launch(PredictKernelFor(launch.router_dtype), blocks, may_start_early, &params, stream);
}

// The smallest parts with which all blocks run at once, so that every load is under way at the
// same time; the largest parts if they never do.
void LaunchLearn(LearnParams params, const PredictorLaunch& launch, cudaStream_t stream) {
  const int32_t num_chunks = NumChunks(params.view.num_features, sizeof(float));
  int32_t num_blocks;
  for (int32_t num_loads = 1; num_loads <= kLearnLoads; ++num_loads) {
    params.split = SplitBy(num_loads, num_chunks);
    num_blocks =
        params.num_pairs + 1 + params.num_pairs * NumGroups(params.view) * params.split.num_parts;
    if (num_blocks <= launch.num_learn_blocks) break;
  }
  Launch(reinterpret_cast<const void*>(&LearnKernel), static_cast<unsigned>(num_blocks), true,
         &params, stream);
}

int32_t MaxPredictorParts(const View& view, DType router_dtype) {
  return SplitPrediction(view, router_dtype).NumParts(1);
}

}  // namespace expertflow
