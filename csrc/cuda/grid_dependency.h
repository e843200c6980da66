#pragma once

// Programmatic dependent launch (compute capability 9.0): a kernel may start before the one ahead
// of it in the stream has ended. Elsewhere kernels of a stream just follow each other.

namespace expertflow {

// Lets the next kernel start once every block of this one has called this or ended.
__device__ inline void LetDependentsStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Blocks until the kernel before has ended and its writes can be read.
__device__ inline void WaitForPrerequisites() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace expertflow
