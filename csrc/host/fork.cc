#include "host/fork.h"

#include <pthread.h>

#include <atomic>
#include <new>
#include <stdexcept>

namespace expertflow {

int ForkGeneration() {
  static std::atomic<int> generation{0};
  static const int registered = pthread_atfork(nullptr, nullptr, [] { ++generation; });
  if (registered != 0) throw std::bad_alloc();  // the only way in which it fails
  return generation.load(std::memory_order_relaxed);
}

void CheckSameProcess(int generation) {
  if (ForkGeneration() == generation) return;
  throw std::logic_error(
      "this expert cache was made before a fork and cannot be used in the child: "
      "load the model in the process that runs it");
}

}  // namespace expertflow
