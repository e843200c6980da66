#pragma once

// Per-slot functions run on the host, in the simulator and in CUDA kernels, so that all decide
// alike.
#ifdef __CUDACC__
#define EXPERTFLOW_HD __host__ __device__
#else
#define EXPERTFLOW_HD
#endif
