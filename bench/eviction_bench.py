"""Which share of the gap between LRU and Belady the eviction policies close on recorded routing.

The protocol: the first 16,000 tokens of a trace, of which the second half counts; one cache per
layer, 25 % and 50 % of its experts rounded down to whole slots; nothing is prefetched. The policies
run in the library's own planner (build/dev/eviction_bench, built by `make bench`).

    python bench/eviction_bench.py TRACE.npz... [--scope global] [--first-token 16000]
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
BINARY = REPOSITORY / "build" / "dev" / "eviction_bench"
FRACTIONS = (0.25, 0.5)


def replay(
    expert_ids: np.ndarray, num_experts: int, scope: str
) -> dict[int, dict[str, tuple[float, float]]]:
    """Hit rate and CPU microseconds per layer, by slots per layer and policy."""
    sizes = [int(fraction * num_experts) for fraction in FRACTIONS]
    with tempfile.NamedTemporaryFile(suffix=".npy") as ids:
        np.save(ids, expert_ids)
        ids.flush()
        command = [BINARY, ids.name, *map(str, [num_experts, scope, *sizes])]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    results: dict[int, dict[str, tuple[float, float]]] = {size: {} for size in sizes}
    for line in output.splitlines():
        policy, size, hit_rate, us_per_layer = line.split()
        results[int(size)][policy] = (float(hit_rate), float(us_per_layer))
    return results


def print_table(path: Path, expert_ids: np.ndarray, num_experts: int, scope: str) -> None:
    """One row per cache size and policy."""
    for size, of_policy in replay(expert_ids, num_experts, scope).items():
        lru, belady = of_policy["lru"][0], of_policy["belady"][0]
        for policy, (hit_rate, us_per_layer) in of_policy.items():
            gap_closed = (hit_rate - lru) / (belady - lru)
            cost = "" if policy == "belady" else f"{us_per_layer:.2f}"
            print(
                f"| {path.stem} | {size} of {num_experts} | {policy} | {hit_rate:.4f} "
                f"| {gap_closed:.1%} | {cost} |"
            )


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE.npz")
    parser.add_argument("--scope", choices=("layer", "global"), default="layer")
    parser.add_argument("--first-token", type=int, default=0)
    parser.add_argument("--num-tokens", type=int, default=16_000)
    options = parser.parse_args()
    if not BINARY.exists():
        parser.error(f"{BINARY} is missing: run `make bench`")
    print("| trace | slots per layer | policy | hit rate | gap closed | CPU µs per layer |")
    print("|---|---|---|---|---|---|")
    for path in options.traces:
        with np.load(path) as trace:
            last = options.first_token + options.num_tokens
            expert_ids = trace["expert_ids"][options.first_token : last]
            print_table(path, expert_ids, int(trace["num_experts"]), options.scope)


if __name__ == "__main__":
    main()
