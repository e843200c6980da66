#pragma once

#include "cuda/async_copy.h"
#include "cuda/expert_mlp/elements.h"
#include "cuda/predictor/block_sum.h"
#include "cuda/predictor/row_part.h"

namespace expertflow::predictor {

// Parts of rows on their way. A lane reads what it copied itself, so that warps need no barrier.
using PartRing = uint4[kPredictStages][kPredictLoads][kThreads];

// The rows of experts, [experts, num_chunks of 16 bytes], and the part of them that counts.
struct RowsPart {
  const uint4* rows;
  int num_chunks;
  ChunkRange range;
};

// Sums over a part of the rows of groups of kWarps experts, a warp each, from `first_group` on.
template <class Scalar>
class PartSums {
 public:
  __device__ PartSums(PartRing& ring, const RowsPart& part, int num_experts, int first_group,
                      int end_group)
      : ring_(ring),
        part_(part),
        thread_(static_cast<int>(threadIdx.x)),
        num_experts_(num_experts),
        first_group_(first_group),
        end_group_(end_group) {}

  // Starts to read rows, as many as there is room for. Only updates change them, of other rows
  // than these or joined before: the kernel that makes the token may still run.
  __device__ void Start() const {
#pragma unroll
    for (int stage = 0; stage < kPredictStages; ++stage) Load(first_group_ + stage, stage);
  }

  // Where the lane's features begin, four by four; -1 beyond the part.
  static constexpr int kNumFours = kPredictLoads * mlp::kChunkElements<Scalar> / 4;
  __device__ void FindFours(int (&at)[kNumFours]) const {
#pragma unroll
    for (int i = 0; i < kNumFours; ++i) {
      const int chunk = ChunkOf(i / kFours);
      at[i] = chunk < part_.range.end ? 4 * (chunk * kFours + i % kFours) : -1;
    }
  }

  // sums[expert] = the product of the expert's part with the lanes' features.
  __device__ void Sum(const float4 (&x)[kNumFours], float* sums) const {
    int stage = 0;
#pragma unroll 1
    for (int group = first_group_; group < end_group_; ++group) {
      AwaitCopies<kPredictStages - 1>();
      const float lane_sum = Dot(x, stage);
      Load(group + kPredictStages, stage);
      const float sum = WarpSum(lane_sum);
      const int expert = ExpertOf(group);
      if (thread_ % 32 == 0 && expert < num_experts_) sums[expert] = sum;
      stage = stage + 1 < kPredictStages ? stage + 1 : 0;
    }
  }

 private:
  static constexpr int kElements = mlp::kChunkElements<Scalar>;
  static constexpr int kFours = kElements / 4;

  __device__ int ExpertOf(int group) const { return group * kWarps + thread_ / 32; }
  __device__ int ChunkOf(int load) const { return part_.range.begin + 32 * load + thread_ % 32; }

  // A group of copies, empty behind the last group of experts.
  __device__ void Load(int group, int stage) const {
    if (group < end_group_) {
      const int expert = ExpertOf(group);
      const uint4* row = part_.rows + static_cast<size_t>(expert) * size_t(part_.num_chunks);
#pragma unroll
      for (int i = 0; i < kPredictLoads; ++i) {
        const int chunk = ChunkOf(i);
        CopyAsync(ring_[stage][i][thread_], row + chunk,
                  expert < num_experts_ && chunk < part_.range.end);
      }
    }
    CommitCopies();
  }

  __device__ float Dot(const float4 (&x)[kNumFours], int stage) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPredictLoads; ++i) {
      float w[kElements];
      mlp::Unpack<Scalar>(ring_[stage][i][thread_], w);
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
        const float4& four = x[i * kFours + j];
        sum = fmaf(w[4 * j], four.x, sum);
        sum = fmaf(w[4 * j + 1], four.y, sum);
        sum = fmaf(w[4 * j + 2], four.z, sum);
        sum = fmaf(w[4 * j + 3], four.w, sum);
      }
    }
    return sum;
  }

  PartRing& ring_;
  RowsPart part_;
  int thread_;
  int num_experts_;
  int first_group_, end_group_;
};

}  // namespace expertflow::predictor
