#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "core/dtype.h"
#include "core/ids.h"
#include "core/predictor/predictor.h"
#include "cuda/event.h"
#include "cuda/pinned_memory.h"
#include "cuda/predictor/device_state.h"
#include "cuda/predictor_kernel.h"
#include "cuda/stream.h"

namespace expertflow {

// The token that a layer sees, in device memory that stays as it is until the stream is past it.
struct ObservedToken {
  const void* hidden;  // [hidden], aligned to 16 bytes: the router input
  DType dtype;
  const int64_t* id = nullptr;  // of the token; nullptr, or a negative one: not known
  // [layers * experts] of the slot table: experts that have a slot are not listed. nullptr: all are
  // candidates.
  const SlotId* expert_slot = nullptr;
};

// The Predictor (core/predictor/predictor.h) in the memory of the device that is current when it is
// made, for passes of one row: the same arithmetic, rounded otherwise, and the same bits run after
// run on one kind of device.
//
//   BeginPass(stream)
//   Observe(kTokenStart, embedding, stream), or not
//   for each layer: Observe(layer, token, stream), one launch; need(distance), once the stream is
//                   there; Learn(layer, stream), one launch on a stream of its own, beside what
//                   `stream` does meanwhile
//
// In a graph the calls are captured as they are, with JoinLearning(stream) at the end of the
// capture, before it begins, and before a replay that follows a pass outside the graph. Not
// thread-safe.
class DevicePredictor {
 public:
  struct Options {
    float min_need = 0.4f;       // of the experts that are listed
    int32_t list_size = 16;      // the most experts listed for a distance
    bool publishes_need = true;  // to the host
  };

  // Takes over the routers and what `host` has learned. Router weights are kept in a narrower dtype
  // where that loses nothing. Throws std::invalid_argument for a hidden size that is no multiple of
  // 8, more than 256 experts or 8 distances; OutOfDeviceMemory; CudaError.
  DevicePredictor(const Predictor& host, const Options& options);
  ~DevicePredictor();
  DevicePredictor(const DevicePredictor&) = delete;
  DevicePredictor& operator=(const DevicePredictor&) = delete;

  // Learning of the pass before is done before what is enqueued on `stream` from now on.
  void BeginPass(cudaStream_t stream);
  void JoinLearning(cudaStream_t stream);

  // Foresees the layers behind `layer`. Throws std::out_of_range, std::invalid_argument, CudaError.
  void Observe(int32_t layer, const ObservedToken& token, cudaStream_t stream);

  // Learns from how `layer`, which was observed in this pass on `stream`, routes its token. Throws
  // std::logic_error if it was not.
  void Learn(int32_t layer, cudaStream_t stream);

  // How many distances the last Observe covers.
  int32_t num_distances() const { return num_distances_; }
  // Of the last Observe: [experts], valid until the next one. Waits for it; after anything that has
  // waited for the stream meanwhile it costs nothing. Throws std::out_of_range; std::logic_error if
  // needs are not published, or the Observe was captured.
  std::span<const float> need(int32_t distance) const;

  // In device memory, overwritten by the next Observe: row d - 1 is about distance d.
  const int32_t* prefetch_ids() const { return state_.view().prefetch_ids; }  // [.., list_size]
  const int32_t* prefetch_counts() const { return state_.view().prefetch_counts; }  // [..]

  // All that was learned. These wait for all work of the device, and a pass must begin after them.
  void CopyFrom(const LearnedState& state);
  void CopyTo(LearnedState& state) const;

  DType router_dtype() const { return state_.router_dtype(); }

 private:
  void CheckLayer(int32_t layer, int32_t first) const;
  void Follow(cudaStream_t stream);
  uint64_t* host_words() const { return reinterpret_cast<uint64_t*>(host_->data()); }
  float* host_need() const {
    return reinterpret_cast<float*>(host_words() + predictor::kMaxDistance);
  }

  PredictorConfig config_;
  Options options_;
  int device_;
  std::vector<size_t> first_pair_;  // by source: the embedding, then the layers
  predictor::DeviceState state_;
  PredictorLaunch launch_;
  std::optional<PinnedMemory> host_;  // a word for each distance, then the needs
  CudaStream learning_stream_;
  CudaEvent observed_, learned_, followed_;
  bool is_learning_ = false;             // since the last join
  bool is_next_after_learning_ = false;  // the next Observe is the first since a join
  int64_t pass_ = 0;
  std::vector<int64_t> observed_pass_;  // [1 + layers] by source: the last one
  int32_t num_distances_ = 0;
  uint64_t num_observed_ = 0;
  std::optional<cudaStream_t> last_stream_;  // of the last Observe, unless it was captured
  bool is_captured_ = false;                 // the last Observe
};

}  // namespace expertflow
