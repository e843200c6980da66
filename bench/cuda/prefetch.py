r"""Prefetch seen on a GPU: measured stall per token beside the simulator's for the same run.

    python -m expertflow record docs-moe-12x32 --text docs-moe-12x32/heldout-text.txt \
        --tokens 30000 --predictions --out docs-moe-predictions.npz
    python bench/cuda/prefetch.py --trace docs-moe-predictions.npz [--json FILE]

The trace's routing at DeepSeek-V2-Lite's sizes (bf16, hidden 2048, experts of 17.3 MB, two shared
ones, attention over a context): each layer is a CUDA graph of everything but the experts, then the
plan, whose misses are on their way by then, the prefetches, and the experts. No head and no
embedding, but each token begins as a model does: wait for what was computed, then prefetch for the
first layers. Two contexts stand for two layer times. What the real predictor foresaw is replayed
from the trace; what it costs on the GPU is measured elsewhere. The last tokens of the trace are
run, where it has learned most. The adaptive horizon learns from the run itself: the warm-up must be
long enough for that. At 75 % cached few experts are missed, so more tokens are measured there.

- measured: the cache's statistics, that is, time in which the stream stood still before an expert,
  by events
- wall: wall time less that of the same calls with all experts resident, the cross-check; it also
  has what a miss costs beside waiting, such as a launch for each expert
- simulated: the same trace, slots, policy, chunks and warm-up. Bandwidth and latency of the link
  are those of raw copies. A layer takes what the median token of the measured run took without its
  stalls, less what copies slowed it down, measured with resident experts, and less what misses
  cost beside stalls (to post and launch each alone), measured with half of the experts resident.
  What of it comes after the plan, where the host's launch counts, too, is what the run's layers
  without a miss took. All measured in this run
- perfect: knows what the rest of the token needs; clairvoyant, which is the simulator's oracle:
  what the next token needs, too

With --device cpu the caches are those of the CPU backend, a layer's time is slept, experts take no
time, and all threads share the link: a test of this benchmark, and no figure.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from foreseen import Foreseen, clairvoyant, last_tokens, perfect, recorded
from loads import CpuLoad, GpuLoad, Load
from measured_run import run
from prefetch_costs import Costs, measure_costs
from prefetch_methods import METHODS, ON_DEMAND, Method, Prefetcher
from prefetch_table import HEAD, Row, line, print_summary

from expertflow.cache import hit_rate
from expertflow.simulation import Simulation
from expertflow.traces import Trace, load_trace


def compare(
    load: Load,
    share: float,
    method: Method,
    foreseen: dict[str, Foreseen],
    costs: Costs,
    warmup: int,
    tokens: int,
) -> Row:
    """Measure one method and simulate the same."""
    source = foreseen[method.predictor or "recorded"]
    layers, num_experts = source.trace.num_layers, source.trace.num_experts
    num_slots = int(share * layers * num_experts)
    cache = load.cache(num_slots, method.policy)
    seen = run(load, cache, Prefetcher(cache, method, foreseen), warmup, tokens)
    counts = seen.counts
    machine = costs.machine(seen, load, num_slots, layers)
    simulation = Simulation(source.trace.head(warmup + tokens), machine, warmup_tokens=warmup)
    assert simulation.num_slots == num_slots
    predictor = source.simulated_as if method.predictor else "none"
    simulated = simulation.run(method.policy, predictor, method.horizon)
    return Row(
        load=load.name,
        cache=f"{share:.0%}",
        method=method.name,
        measured_us=counts["stall_us"] / tokens,
        simulated_us=simulated["stall_us_per_token"],
        wall_us=seen.token_us - costs.resident_us[method.calls],
        hits=hit_rate(counts),
        simulated_hits=simulated["hit_rate"],
        mean_horizon=seen.mean_horizon,
        simulated_horizon=simulated["mean_horizon"],
        prefetch_bytes=counts["prefetch_bytes"] / tokens,
        wasted_bytes=counts["wasted_prefetch_bytes"] / tokens,
        machine=asdict(machine),
    )


def bench(load: Load, trace: Trace, options: argparse.Namespace) -> tuple[Costs, list[Row]]:
    """All methods at all cache sizes."""
    foreseen = {
        "recorded": recorded(trace),
        "perfect": perfect(trace),
        "clairvoyant": clairvoyant(trace),
    }
    warmup, rows = options.warmup, []
    few = min(*options.tokens, 150)
    costs = measure_costs(load, trace, foreseen, few)
    print_costs(load, trace, costs)
    # On demand every token costs the same, whatever the cache.
    rows.append(compare(load, min(options.shares), ON_DEMAND, foreseen, costs, warmup, few))
    print(line(rows[-1]), flush=True)
    for share, tokens in zip(options.shares, options.tokens, strict=True):
        for method in METHODS:
            rows.append(compare(load, share, method, foreseen, costs, warmup, tokens))
            print(line(rows[-1]), flush=True)
    return costs, rows


def print_costs(load: Load, trace: Trace, costs: Costs) -> None:
    link = costs.link
    resident = ", ".join(f"{us:.0f} ({calls})" for calls, us in costs.resident_us.items())
    print(
        f"\n{load.name}: {trace.num_layers} x {trace.num_experts} experts of "
        f"{load.expert_bytes / 1e6:.1f} MB, top-{trace.top_k}; us and bytes are per token\n"
        f"link {link.bandwidth_gbps:.1f} GB/s + {link.latency_us:.1f} us a copy, and layers "
        f"{costs.copy_slowdown:.1%} longer beside copies; {costs.planned_us:.1f} us from a plan "
        f"until its experts are computed, if it misses none, and {costs.miss_us:.1f} us longer for "
        f"each that it misses, beside stalls\nall resident: {resident}\n{HEAD}"
    )


def loads(trace: Trace, options: argparse.Namespace) -> Iterator[Load]:
    if options.device == "cpu":
        yield CpuLoad(trace, options.expert_kib << 10, options.layer_us)
        return
    gpu = GpuLoad(trace, options.contexts[0])
    yield gpu
    for context in options.contexts[1:]:
        gpu.set_context(context)
        yield gpu


def save(path: Path, costs: dict[str, Costs], rows: list[Row]) -> None:
    found = {
        "costs": {name: asdict(one) for name, one in costs.items()},
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, required=True, help="recorded with --predictions")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--warmup", type=int, default=200, help="tokens")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[200, 200, 1200],
        help="that are measured: one number, or one for each share",
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--expert-kib", type=int, default=1024, help="of --device cpu")
    parser.add_argument("--layer-us", type=float, default=1000.0, help="of --device cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if len(options.tokens) == 1:
        options.tokens *= len(options.shares)
    if len(options.tokens) != len(options.shares):
        parser.error("--tokens needs one number, or as many as --shares")
    trace = last_tokens(load_trace(options.trace), options.warmup + max(options.tokens))
    gc.disable()  # it would take as long as several layers
    costs: dict[str, Costs] = {}
    rows: list[Row] = []
    for load in loads(trace, options):
        costs[load.name], more = bench(load, trace, options)
        rows += more
        if options.json:  # also if a later load should not get through
            save(options.json, costs, rows)
    print_summary(rows)


if __name__ == "__main__":
    main()
