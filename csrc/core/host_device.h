#pragma once

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
#else
#define EXPERTFLOW_DEVICE
#define EXPERTFLOW_UNROLL
#endif
