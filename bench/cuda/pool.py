"""Loading a pinned pool from page cache beside parallel reads into plain memory.

A checkpoint of experts (default: 6,144 of 9 MiB, the shape of Qwen3-30B-A3B) is written to
`--dir`, which should be a tmpfs or hold it in page cache. Rounds alternate: reads of the file by
threads into anonymous memory in huge pages; and the pool, which is read and page-locked.
"""

import argparse
import mmap
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from expertflow import _core

EXPERT_BYTES = 9 << 20


def write_file(path: Path, num_experts: int, threads: int) -> None:
    block = np.random.default_rng(0).integers(0, 256, EXPERT_BYTES, dtype=np.uint8).tobytes()
    with path.open("wb") as file:
        os.ftruncate(file.fileno(), num_experts * EXPERT_BYTES)
        with ThreadPoolExecutor(threads) as pool:
            list(
                pool.map(
                    lambda expert: os.pwrite(file.fileno(), block, expert * EXPERT_BYTES),
                    range(num_experts),
                )
            )


def plain_seconds(path: Path, num_experts: int, threads: int) -> float:
    memory = mmap.mmap(-1, num_experts * EXPERT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    with path.open("rb") as file, ThreadPoolExecutor(threads) as pool:

        def read(expert: int) -> None:
            begin, end = expert * EXPERT_BYTES, (expert + 1) * EXPERT_BYTES
            while begin < end:
                begin += os.preadv(file.fileno(), [view[begin:end]], begin)

        begin = time.perf_counter()
        list(pool.map(read, range(num_experts)))
        seconds = time.perf_counter() - begin
    view.release()
    memory.close()
    return seconds


def pinned_seconds(path: Path, num_experts: int, threads: int) -> float:
    layout = _core.ExpertLayout([("w", "bfloat16", EXPERT_BYTES // 2)])
    extents = np.array(
        [[[0, e * EXPERT_BYTES, 0, EXPERT_BYTES // 2, 1]] for e in range(num_experts)]
    )
    source = _core.CheckpointSource([str(path)], layout, extents)
    begin = time.perf_counter()
    pool = _core.RamPool(layout, num_experts)
    pinned = _core.PinnedPool(pool, 0, is_required=True)
    fill = pinned.start_fill(pool, source, threads)
    while not fill.wait(1.0):
        pass
    return time.perf_counter() - begin


def rounds(options: argparse.Namespace, path: Path) -> Iterator[tuple[float, float]]:
    for _ in range(options.rounds):
        yield (
            plain_seconds(path, options.experts, options.threads),
            pinned_seconds(path, options.experts, options.threads),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--experts", type=int, default=6144)
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    path = options.dir / "expertflow_pool_bench.bin"
    try:
        write_file(path, options.experts, options.threads)
        times = list(rounds(options, path))
    finally:
        path.unlink(missing_ok=True)
    gib = options.experts * EXPERT_BYTES / 2**30
    plain, pinned = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"{gib:.1f} GiB with {options.threads} threads: plain memory {gib / plain:.1f} GiB/s, "
        f"pinned pool {gib / pinned:.1f} GiB/s ({plain / pinned:.0%}); "
        f"rounds {[f'{a:.2f} {b:.2f}' for a, b in times]} s"
    )


if __name__ == "__main__":
    main()
