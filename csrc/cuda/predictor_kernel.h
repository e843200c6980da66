#pragma once

#include <cuda_runtime_api.h>

#include "core/dtype.h"
#include "cuda/predictor/params.h"

namespace expertflow {

// What launches need to know of the device and of the kernels.
struct PredictorLaunch {
  DType router_dtype;
  int32_t num_predict_blocks;  // that run at once
  int32_t num_learn_blocks;
};

// For the device that is current. Throws CudaError.
PredictorLaunch PreparePredictor(DType router_dtype);

// The launches of the predictor; DevicePredictor checks the parameters, and the split of rows into
// parts is chosen here. Both may be captured in a CUDA graph, and may start while the kernel before
// them ends. Meanwhile an update touches no memory; a prediction reads what only updates write, so
// the first one that waits for updates must not start early. Throw CudaError.
//
// A prediction reads the weights of all distances and the routers once and is done in one launch.
// An update of layer j and a prediction of a later layer of the same pass touch different memory,
// so they may run at the same time; all updates of a pass must be done before the next pass begins.
void LaunchPredict(predictor::PredictParams params, const PredictorLaunch& launch,
                   bool may_start_early, cudaStream_t stream);
void LaunchLearn(predictor::LearnParams params, const PredictorLaunch& launch, cudaStream_t stream);

// The most parts that a row is cut into, for the size of View::partial.
int32_t MaxPredictorParts(const predictor::View& view, DType router_dtype);

}  // namespace expertflow
