#include "cuda/planner_kernel.h"

#include "core/block_need_learner.h"
#include "cuda/cuda_block.h"
#include "cuda/planner_launch.h"

namespace expertflow {
namespace {

constexpr unsigned kLearningThreads = 512;

__global__ void __launch_bounds__(kLearningThreads)
    LearnNeedsKernel(const BlockNeedState state, int64_t* expert_key, int32_t layer) {
  __shared__ BlockLearnerShared shared;
  extern __shared__ int32_t shared_words[];
  CudaBlock block;
  BlockNeedLearner<CudaBlock>(block, shared, shared_words, state, expert_key, layer).Learn();
}

}  // namespace

void LaunchPlanLayer(const PlanningView& planning, const LayerPlanRequest& request,
                     cudaStream_t stream) {
  LaunchPlanLayerOn(CudaBlock(), planning, request, stream);
}

void LaunchLearnNeeds(const PlanningView& planning, int32_t layer, cudaStream_t stream) {
  CheckPlannable(layer >= 0 && layer < planning.table.num_layers, "layer", layer,
                 planning.table.num_layers - 1);
  CheckNeedModel(planning);
  const NeedState& model = planning.need.model;
  const auto* kernel = reinterpret_cast<const void*>(&LearnNeedsKernel);
  const auto num_words = static_cast<size_t>(NumLearnerWords(model.num_experts, model.width));
  const size_t shared_bytes = sizeof(int32_t) * num_words;
  CheckShared(planning, sizeof(BlockLearnerShared), shared_bytes);
  int64_t* expert_key = planning.table.expert_key;
  void* arguments[] = {const_cast<BlockNeedState*>(&planning.need), &expert_key, &layer};
  LaunchOverlapped({.kernel = kernel,
                    .num_blocks = 1,
                    .num_threads = kLearningThreads,
                    .shared_bytes = shared_bytes},
                   arguments, stream);
}

}  // namespace expertflow
