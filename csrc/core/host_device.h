#pragma once

#include <cstdint>

// Per-slot functions run on the host, in the simulator and in CUDA kernels, so that all decide
// alike.
#ifdef __CUDACC__
#define EXPERTFLOW_HD __host__ __device__
#else
#define EXPERTFLOW_HD
#endif

// What the threads of a CUDA block do together. Where nvcc does not compile it, it is host code, so
// that tests can run it on threads of the CPU.
#ifdef __CUDACC__
#define EXPERTFLOW_DEVICE __device__
#define EXPERTFLOW_UNROLL _Pragma("unroll")
// For loops that mostly run once: a kernel that runs once, too, waits for instructions to come.
#define EXPERTFLOW_NO_UNROLL _Pragma("unroll 1")
#else
#define EXPERTFLOW_DEVICE
#define EXPERTFLOW_UNROLL
#define EXPERTFLOW_NO_UNROLL
#endif

namespace expertflow {

EXPERTFLOW_HD inline int32_t CountBits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

}  // namespace expertflow
