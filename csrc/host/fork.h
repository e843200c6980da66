#pragma once

namespace expertflow {

// How many forks lie between this process and the one that loaded the library. Threads, locks and
// CUDA contexts of a parent are of no use to a child. Unlike getpid, which takes 0.1 to 0.2 us,
// asking costs nothing.
int ForkGeneration();

// Throws std::logic_error unless this is the process that a cache was made in, at `generation`.
void CheckSameProcess(int generation);

}  // namespace expertflow
