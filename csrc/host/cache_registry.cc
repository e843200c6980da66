#include "host/cache_registry.h"

#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace expertflow {
namespace {

struct Registry {
  std::mutex mutex;
  int64_t next_id = 1;
  std::unordered_map<int64_t, std::weak_ptr<ExpertCache>> caches;
};

Registry& TheRegistry() {
  static auto* registry = new Registry;  // never destroyed: ops may run while the process exits
  return *registry;
}

}  // namespace

int64_t RegisterCache(std::weak_ptr<ExpertCache> cache) {
  Registry& registry = TheRegistry();
  const std::scoped_lock lock(registry.mutex);
  registry.caches.emplace(registry.next_id, std::move(cache));
  return registry.next_id++;
}

std::shared_ptr<ExpertCache> FindCache(int64_t id) {
  Registry& registry = TheRegistry();
  const std::scoped_lock lock(registry.mutex);
  const auto found = registry.caches.find(id);
  std::shared_ptr<ExpertCache> cache;
  if (found != registry.caches.end()) cache = found->second.lock();
  if (!cache) {
    throw std::invalid_argument("there is no expert cache " + std::to_string(id) +
                                ": it was closed, or the handle tensor is not one");
  }
  return cache;
}

void UnregisterCache(int64_t id) {
  Registry& registry = TheRegistry();
  const std::scoped_lock lock(registry.mutex);
  registry.caches.erase(id);
}

}  // namespace expertflow
