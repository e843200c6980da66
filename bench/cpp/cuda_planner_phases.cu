#include "cuda/cuda_block.h"
#include "cuda/grid_dependency.h"
#include "cuda/overlapped_launch.h"
#include "cuda/planner_launch.h"
#include "cuda_planner_phases.h"

namespace expertflow {
namespace {

struct TimedBlock : CudaBlock {
  int64_t* phase_cycles;

  __device__ void Mark(PlanPhase phase) {
    __shared__ int64_t stamps[kNumPlanPhases][kMaxWarps];
    if (thread() % kWarpSize == 0) stamps[Number(phase)][thread() / kWarpSize] = clock64();
    if (phase != PlanPhase::kDone) return;
    Sync();
    const int32_t own = thread();
    if (own == 0 || own >= kNumPlanPhases) return;
    const int64_t cycles = Latest(stamps[own]) - Latest(stamps[own - 1]);
    Add(phase_cycles[own], cycles);
  }

 private:
  __device__ static int32_t Number(PlanPhase phase) { return static_cast<int32_t>(phase); }

  __device__ int64_t Latest(const int64_t* of_warps) const {
    int64_t latest = 0;
    for (int32_t warp = 0; warp < num_threads() / kWarpSize; ++warp) {
      latest = of_warps[warp] > latest ? of_warps[warp] : latest;
    }
    return latest;
  }
};

__global__ void LearnAgainKernel(const BlockNeedState state, int32_t layer) {
  WaitForPrerequisites();
  LetDependentsStart();
  state.outcome->observed_layer = layer;
}

}  // namespace

void LaunchTimedPlanLayer(const PlanningView& planning, const LayerPlanRequest& request,
                          int64_t* phase_cycles, cudaStream_t stream) {
  LaunchPlanLayerOn(TimedBlock{{}, phase_cycles}, planning, request, stream);
}

void LaunchLearnAgain(const PlanningView& planning, int32_t layer, cudaStream_t stream) {
  void* arguments[] = {const_cast<BlockNeedState*>(&planning.need), &layer};
  LaunchOverlapped({.kernel = reinterpret_cast<const void*>(&LearnAgainKernel),
                    .num_blocks = 1,
                    .num_threads = 1,
                    .shared_bytes = 0},
                   arguments, stream);
}

}  // namespace expertflow
