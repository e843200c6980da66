// Counts what the program takes from the heap. Replaces operator new for the whole program, so only
// one source file of a test may include it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace expertflow {

inline std::atomic<int64_t> num_allocations{0};

}  // namespace expertflow

// Not inlined: GCC would see free() called on what operator new returned, and warn.
[[gnu::noinline]] void* operator new(size_t num_bytes) {
  expertflow::num_allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* block = std::malloc(num_bytes)) return block;
  throw std::bad_alloc();
}

[[gnu::noinline]] void operator delete(void* block) noexcept { std::free(block); }
[[gnu::noinline]] void operator delete(void* block, size_t) noexcept { std::free(block); }
