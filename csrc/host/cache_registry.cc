#include "host/cache_registry.h"

#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace expertflow {
namespace {

struct Entry {
  Backend backend;
  std::weak_ptr<void> cache;
};

struct Registry {
  std::mutex mutex;
  int64_t next_id = 1;
  std::unordered_map<int64_t, Entry> caches;
};

Registry& TheRegistry() {
  static auto* registry = new Registry;  // never destroyed: ops may run while the process exits
  return *registry;
}

}  // namespace

int64_t RegisterCache(Backend backend, std::weak_ptr<void> cache) {
  Registry& registry = TheRegistry();
  const std::scoped_lock lock(registry.mutex);
  registry.caches.emplace(registry.next_id, Entry{backend, std::move(cache)});
  return registry.next_id++;
}

FoundCache FindCache(int64_t id) {
  Registry& registry = TheRegistry();
  const std::scoped_lock lock(registry.mutex);
  const auto found = registry.caches.find(id);
  FoundCache result{};
  if (found != registry.caches.end()) result = {found->second.backend, found->second.cache.lock()};
  if (!result.cache) {
    throw std::invalid_argument("there is no expert cache " + std::to_string(id) +
                                ": it was closed, or the handle tensor is not one");
  }
  return result;
}

void UnregisterCache(int64_t id) {
  Registry& registry = TheRegistry();
  const std::scoped_lock lock(registry.mutex);
  registry.caches.erase(id);
}

}  // namespace expertflow
