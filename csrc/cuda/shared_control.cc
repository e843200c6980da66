#include "cuda/shared_control.h"

#include <chrono>

namespace expertflow::cuda {
namespace {

constexpr int kMaxLockSpins = 2000;

}  // namespace

SharedControl::Lock SharedControl::Acquire() const {
  Lock lock(mutex, std::try_to_lock);
  for (int i = 0; !lock && i < kMaxLockSpins; ++i) {
    Pause();
    static_cast<void>(lock.try_lock());
  }
  if (!lock) lock.lock();  // whoever holds it was put to sleep
  return lock;
}

void Pause() {
  for (int i = 0; i < 16; ++i) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
}

double NowUs() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace expertflow::cuda
