#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "core/expert_layout.h"
#include "cuda/expert_mlp.h"
#include "cuda/stream.h"
#include "device_buffer.h"
#include "expert_mlp_reference.h"

namespace expertflow {

inline constexpr int32_t kNumExperts = 6;
inline constexpr int32_t kTopK = 4;
inline constexpr int32_t kNumSlots = 9;

struct Group {
  int32_t slot;
  std::vector<int32_t> places;
};

// Random experts in scattered slots, tokens, and a routing of kTopK distinct experts a token.
class Problem {
 public:
  Problem(ExpertMlpKind kind, DType dtype, int32_t hidden, int32_t intermediate, int32_t num_tokens)
      : dtype_(dtype), hidden_(hidden), num_tokens_(num_tokens) {
    for (int32_t i = 0; i < kNumExperts; ++i) {
      experts_.emplace_back(kind, dtype, hidden, intermediate, random_);
    }
    const ExpertLayout layout(experts_[0].Segments(dtype));
    const std::vector<Segment>& segments = layout.segments();
    shape_ = {kind,
              dtype,
              hidden,
              intermediate,
              layout.slot_bytes(),
              segments[0].offset_bytes,
              segments[2].offset_bytes,
              segments[1].offset_bytes,
              segments[3].offset_bytes};
    tokens_ = RandomValues(static_cast<size_t>(num_tokens * hidden), 1, dtype, random_);
    for (int32_t token = 0; token < num_tokens; ++token) {
      std::vector<int32_t> experts(kNumExperts);
      std::iota(experts.begin(), experts.end(), 0);
      std::shuffle(experts.begin(), experts.end(), random_);
      experts_of_places_.insert(experts_of_places_.end(), experts.begin(), experts.begin() + kTopK);
    }
  }

  const ExpertMlpShape& shape() const { return shape_; }
  int32_t num_places() const { return num_tokens_ * kTopK; }
  int32_t hidden() const { return hidden_; }
  DType dtype() const { return dtype_; }
  std::vector<float>& tokens() { return tokens_; }
  const std::vector<float>& tokens() const { return tokens_; }

  // Slot of expert 0, 1, ..., all different.
  std::vector<int32_t> RandomSlots() {
    std::vector<int32_t> slots(kNumSlots);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), random_);
    slots.resize(kNumExperts);
    return slots;
  }

  // The experts' bytes; NaN around them.
  std::vector<std::byte> Cache(const std::vector<int32_t>& slots) const {
    const size_t stride = shape_.slot_stride_bytes;
    std::vector<std::byte> cache(kNumSlots * stride, std::byte{0xFF});
    for (size_t i = 0; i < kNumExperts; ++i) {
      const ExpertLayout layout(experts_[i].Segments(dtype_));
      for (size_t segment = 0; segment < layout.segments().size(); ++segment) {
        const std::vector<std::byte> bytes = ToBytes(*experts_[i].Values()[segment], dtype_);
        std::copy(bytes.begin(), bytes.end(),
                  cache.data() + static_cast<size_t>(slots[i]) * stride +
                      layout.segments()[segment].offset_bytes);
      }
    }
    return cache;
  }

  // The places of each expert that has any.
  std::vector<Group> Groups(const std::vector<int32_t>& slots) const {
    std::vector<Group> groups;
    for (int32_t expert = 0; expert < kNumExperts; ++expert) {
      Group group{slots[static_cast<size_t>(expert)], {}};
      for (int32_t place = 0; place < num_places(); ++place) {
        if (experts_of_places_[static_cast<size_t>(place)] == expert) group.places.push_back(place);
      }
      if (!group.places.empty()) groups.push_back(group);
    }
    return groups;
  }

  std::vector<double> Reference() const {
    std::vector<double> rows;
    for (int32_t place = 0; place < num_places(); ++place) {
      const int32_t expert = experts_of_places_[static_cast<size_t>(place)];
      const std::vector<double> row = experts_[static_cast<size_t>(expert)].Apply(
          tokens_.data() + static_cast<size_t>(place / kTopK * hidden_));
      rows.insert(rows.end(), row.begin(), row.end());
    }
    return rows;
  }

  // A copy with only some tokens.
  Problem WithTokens(int32_t first, int32_t count) const {
    Problem part = *this;
    part.num_tokens_ = count;
    const auto cut = [&](auto& values, int32_t per_token) {
      values = {values.begin() + first * per_token, values.begin() + (first + count) * per_token};
    };
    cut(part.tokens_, hidden_);
    cut(part.experts_of_places_, kTopK);
    return part;
  }

 private:
  std::mt19937 random_{TestSeed()};
  DType dtype_;
  int32_t hidden_;
  int32_t num_tokens_;
  ExpertMlpShape shape_;
  std::vector<ReferenceExpert> experts_;
  std::vector<float> tokens_;
  std::vector<int32_t> experts_of_places_;
};

// A problem's buffers on the device, and the launches on them.
class DeviceProblem {
 public:
  DeviceProblem(const Problem& problem, const std::vector<int32_t>& slots)
      : mlp_(problem.shape()),
        row_bytes_(static_cast<size_t>(problem.hidden()) * ElementBytes(problem.dtype())),
        num_tokens_(problem.num_places() / kTopK),
        cache_(problem.Cache(slots)),
        hidden_(ToBytes(problem.tokens(), problem.dtype())),
        partial_(static_cast<size_t>(problem.num_places()) * row_bytes_),
        workspace_(mlp_.WorkspaceBytes(problem.num_places())) {}

  void Launch(const std::vector<Group>& groups) {
    workspace_.Poison();
    Enqueue(groups);
    stream_.Synchronize();
  }

  void Enqueue(const std::vector<Group>& groups) {
    std::vector<PairGroup> views;
    for (const Group& group : groups) views.push_back({group.slot, group.places});
    mlp_.Launch({.slots = cache_.data(),
                 .hidden = hidden_.data(),
                 .num_tokens = num_tokens_,
                 .top_k = kTopK,
                 .groups = views,
                 .partial = partial_.data(),
                 .workspace = workspace_.data()},
                stream_.get());
  }

  cudaStream_t stream() const { return stream_.get(); }
  size_t row_bytes() const { return row_bytes_; }
  DeviceBuffer& partial() { return partial_; }

 private:
  ExpertMlp mlp_;
  size_t row_bytes_;
  int32_t num_tokens_;
  CudaStream stream_;
  DeviceBuffer cache_;
  DeviceBuffer hidden_;
  DeviceBuffer partial_;
  DeviceBuffer workspace_;
};

}  // namespace expertflow
