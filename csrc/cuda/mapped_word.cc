#include "cuda/mapped_word.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda/cuda_error.h"

namespace expertflow {
namespace {

constexpr uint32_t kSpinsBetweenChecks = 1 << 16;

// A kernel that failed stores nothing.
bool HasEnded(cudaStream_t stream, std::string_view what) {
  const cudaError_t code = cudaStreamQuery(stream);
  if (code == cudaErrorNotReady) {
    cudaGetLastError();  // it is no failure that a later check should find
    return false;
  }
  if (code != cudaSuccess) {
    CheckCuda(code, "cudaStreamQuery", __FILE__, __LINE__,
              "while waiting for " + std::string(what));
  }
  return true;
}

}  // namespace

void AwaitWord(uint64_t& word, uint64_t value, cudaStream_t stream, std::string_view what) {
  const std::atomic_ref<uint64_t> shared(word);
  const auto is_there = [&] { return shared.load(std::memory_order_acquire) == value; };
  for (uint32_t spins = 1; !is_there(); ++spins) {
    if (spins % kSpinsBetweenChecks != 0 || !HasEnded(stream, what)) continue;
    if (is_there()) return;
    throw std::logic_error("the stream ended without " + std::string(what));
  }
}

}  // namespace expertflow
