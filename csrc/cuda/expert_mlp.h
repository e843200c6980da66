#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/dtype.h"

namespace expertflow {

namespace mlp {
struct Params;
}

// How an expert's matrices lie in its slot, and its activation.
enum class ExpertMlpKind {
  // gate_up [2I, H], gate rows first, down [H, I]: down · (silu(gate x) * up x).
  kStandard,
  // gate_up [H, 2I] with columns gate, up, gate, up, ..., down [I, H], both with a bias, and the
  // clamped activation of transformers' GptOssExperts.
  kGptOss,
};

// One expert: H = hidden, I = intermediate, both multiples of 8. A slot begins at a multiple of
// slot_stride_bytes, a segment at its offset in the slot; all are multiples of 16.
struct ExpertMlpShape {
  ExpertMlpKind kind;
  DType dtype;  // of weights, biases, input and output
  int32_t hidden;
  int32_t intermediate;
  size_t slot_stride_bytes;
  size_t gate_up_offset_bytes;
  size_t down_offset_bytes;
  size_t gate_up_bias_offset_bytes = 0;  // biases: kGptOss only
  size_t down_bias_offset_bytes = 0;
};

// The tokens of one resident expert. Place p is row p of the output and belongs to token p / top_k.
struct PairGroup {
  int32_t slot;
  std::span<const int32_t> places;
};

struct ExpertMlpBatch {
  const void* slots;   // slot 0, in device memory
  const void* hidden;  // [num_tokens, H]
  int32_t num_tokens;  // 1 to 16
  int32_t top_k;       // num_tokens * top_k <= ExpertMlp::kMaxPairs
  std::span<const PairGroup> groups;
  void* partial;    // [num_tokens * top_k, H]; only the rows named by `groups` are written
  void* workspace;  // WorkspaceBytes(number of places in `groups`), of one stream at a time
};

// Experts applied to a few tokens straight from their slots, for decoding: bound by reading the
// weights once. The constructor prepares the device that is current; launch on the same one.
//
// The bits of an output row depend on its token's hidden state and its expert alone, not on the
// slot, the other rows of the launch or how rows are spread over launches. Products are accumulated
// in float32, in a fixed order; biases and activation are float32 too, and the activation is
// rounded once, to `dtype`, where torch rounds after each of its operations.
class ExpertMlp {
 public:
  static constexpr int32_t kMaxTokens = 16;
  static constexpr int32_t kMaxPairs = 256;

  // Throws std::invalid_argument for sizes and offsets that are not as above, CudaError if the
  // device cannot run the kernels.
  explicit ExpertMlp(const ExpertMlpShape& shape);

  const ExpertMlpShape& shape() const { return shape_; }
  size_t WorkspaceBytes(int32_t num_pairs) const;

  // Enqueues on `stream` and returns; what it reads of `batch` on the host may be freed at once.
  // Can be captured in a graph. Throws std::invalid_argument for a batch that is not as described,
  // also if a place is given twice or a pointer is not aligned to 16 bytes. Slots are not checked.
  // Weights are read while the kernel ahead of this one in the stream may still run: it must not
  // write slots. Copies may, of this stream or ordered by events.
  void Launch(const ExpertMlpBatch& batch, cudaStream_t stream) const;

 private:
  // The two kernels for up to max_tokens tokens of an expert at once.
  struct Variant {
    int32_t max_tokens;
    int32_t num_threads;
    size_t shared_bytes;
    const void* gate_up;
    const void* down;
    unsigned num_blocks = 0;  // as many as the device holds at once
  };
  static constexpr int kNumVariants = 3;

  template <class Scalar>
  void UseKernelsOf();
  void PrepareDevice();
  void LaunchStage(const Variant& variant, const void* kernel, const mlp::Params& params,
                   cudaStream_t stream) const;

  ExpertMlpShape shape_;
  Variant variants_[kNumVariants];
};

}  // namespace expertflow
