#include "cuda/planner_kernel.h"

#include "cuda/cuda_block.h"
#include "cuda/planner_launch.h"

namespace expertflow {

void LaunchPlanLayer(const PlanningView& planning, const LayerPlanRequest& request,
                     cudaStream_t stream) {
  LaunchPlanLayerOn(CudaBlock(), planning, request, stream);
}

}  // namespace expertflow
