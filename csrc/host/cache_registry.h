#pragma once

#include <cstdint>
#include <memory>

namespace expertflow {

enum class Backend { kHost, kCuda };

// An expert cache: an ExpertCache, or a cuda::ExpertCache.
struct FoundCache {
  Backend backend;
  std::shared_ptr<void> cache;
};

// Torch ops get a cache as a number inside a tensor; these turn the number into the cache.
// Thread-safe. `cache` must point to the class that belongs to the backend.
int64_t RegisterCache(Backend backend, std::weak_ptr<void> cache);

// Throws std::invalid_argument if the cache was closed or there never was one of that number.
FoundCache FindCache(int64_t id);

void UnregisterCache(int64_t id);

}  // namespace expertflow
