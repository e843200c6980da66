#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/predictor/predictor.h"
#include "cuda/device_memory.h"
#include "cuda/predictor/params.h"

namespace expertflow::predictor {

// Owns all that the predictor's kernels work on, in the memory of the device that is current when
// it is made; call it with the same one current.
class DeviceState {
 public:
  // Takes over routers and what was learned. Throws OutOfDeviceMemory, CudaError.
  DeviceState(const Predictor& host, int32_t list_size);

  const View& view() const { return view_; }
  // Narrower than float32 where that loses nothing.
  DType router_dtype() const { return router_dtype_; }

  // All that is learned, of a predictor of the same sizes. These wait for all work of the device.
  void CopyFrom(const LearnedState& state);
  void CopyTo(LearnedState& state) const;

 private:
  void CopyRouters(const RouterWeights& routers);

  DType router_dtype_;
  View view_ = {};
  DeviceMemory memory_;
};

}  // namespace expertflow::predictor
