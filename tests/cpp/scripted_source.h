// A source of experts whose bytes are known, and whose reads fail and dawdle as a test wants.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "core/expert_source.h"

namespace expertflow {

struct Faults {
  int16_t fail_percent = 0;  // of all reads; half of these throw after they wrote garbage
  int16_t slow_percent = 0;
  int32_t max_delay_us = 100;  // of slow reads
};

class ScriptedSource : public ExpertSource {
 public:
  using Hook = std::function<void(ExpertIndex, size_t offset_bytes)>;

  // `expert_bytes` must be a multiple of 8.
  ScriptedSource(size_t num_experts, size_t expert_bytes)
      : num_experts_(num_experts), expert_bytes_(expert_bytes) {}

  size_t num_experts() const override { return num_experts_; }
  size_t expert_bytes() const override { return expert_bytes_; }

  void Read(ExpertIndex expert, size_t offset_bytes, std::span<std::byte> to) const override {
    if (hook_) hook_(expert, offset_bytes);
    const auto number = num_reads_.fetch_add(1, std::memory_order_relaxed);
    const uint64_t random = Mix(static_cast<uint64_t>(number));
    const Faults faults = faults_.load(std::memory_order_relaxed);
    if (Percent(random) < faults.slow_percent) {
      const auto delay_us = static_cast<int64_t>(Mix(random) % 1000) * faults.max_delay_us / 1000;
      std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
    }
    if (Percent(random >> 16) < faults.fail_percent) {
      if (random >> 63) std::memset(to.data(), 0xEE, to.size() / 2);
      throw std::runtime_error("scripted failure");
    }
    for (size_t i = 0; i < to.size(); i += sizeof(uint64_t)) {
      const uint64_t word = Word(expert, offset_bytes + i);
      std::memcpy(to.data() + i, &word, sizeof(word));
    }
    bytes_read_.fetch_add(static_cast<int64_t>(to.size()), std::memory_order_relaxed);
  }

  // Whether `slot` holds exactly this expert.
  bool Holds(const std::byte* slot, ExpertIndex expert) const {
    for (size_t i = 0; i < expert_bytes_; i += sizeof(uint64_t)) {
      const uint64_t word = Word(expert, i);
      if (std::memcmp(slot + i, &word, sizeof(word)) != 0) return false;
    }
    return true;
  }

  void set_faults(Faults faults) { faults_.store(faults, std::memory_order_relaxed); }
  // Called first in every read, on the reading thread. Set it while nothing is read.
  void set_hook(Hook hook) { hook_ = std::move(hook); }
  int64_t bytes_read() const { return bytes_read_.load(std::memory_order_relaxed); }
  int64_t num_reads() const { return num_reads_.load(std::memory_order_relaxed); }

 private:
  static uint64_t Mix(uint64_t x) {  // splitmix64
    x += 0x9E3779B97F4A7C15ULL;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
    return x ^ (x >> 31);
  }
  static int32_t Percent(uint64_t random) { return static_cast<int32_t>((random & 0xFFFF) % 100); }
  static uint64_t Word(ExpertIndex expert, size_t offset_bytes) {
    return Mix(static_cast<uint64_t>(Index(expert)) << 32 | offset_bytes);
  }

  size_t num_experts_;
  size_t expert_bytes_;
  Hook hook_;
  std::atomic<Faults> faults_{Faults{}};
  mutable std::atomic<int64_t> num_reads_{0};
  mutable std::atomic<int64_t> bytes_read_{0};
};

}  // namespace expertflow
