#pragma once

#include <cuda_runtime.h>

// Copies to shared memory that a thread has under way (compute capability 8.0). Registers would not
// do: ptxas gives all loads that a loop has under way the same scoreboard, so that waiting for the
// oldest one is waiting for all.

namespace expertflow {

// Starts to copy, or to clear.
__device__ inline void CopyAsync(uint4& to, const uint4* from, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(&to))),
               "l"(__cvta_generic_to_global(from)), "r"(is_there ? 16 : 0)
               : "memory");
}

// Ends a group of copies, which may be empty.
__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kCount` groups of this thread are under way; other threads see nothing yet.
template <int kCount>
__device__ void AwaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kCount) : "memory");
}

}  // namespace expertflow
