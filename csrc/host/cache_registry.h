#pragma once

#include <cstdint>
#include <memory>

#include "host/expert_cache.h"

namespace expertflow {

// Torch ops get a cache as a number inside a tensor; these turn the number into the cache.
// Thread-safe.
int64_t RegisterCache(std::weak_ptr<ExpertCache> cache);

// Throws std::invalid_argument if the cache was closed or there never was one of that number.
std::shared_ptr<ExpertCache> FindCache(int64_t id);

void UnregisterCache(int64_t id);

}  // namespace expertflow
