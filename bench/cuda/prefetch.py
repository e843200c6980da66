r"""Prefetch seen on a GPU: measured stall per token beside the simulator's for the same run.

    python -m expertflow record docs-moe-12x32 --text docs-moe-12x32/heldout-text.txt \
        --tokens 10000 --predictions --out docs-moe-predictions.npz
    python bench/cuda/prefetch.py --trace docs-moe-predictions.npz [--json FILE]

The trace's routing at DeepSeek-V2-Lite's sizes (bf16, hidden 2048, experts of 17.3 MB, two shared
ones, attention over a context): each layer is a CUDA graph of everything but the experts, then the
plan, whose misses are on their way by then, the prefetches, and the experts. No head and no
embedding. Two contexts stand for two layer times. What the real predictor foresaw is replayed from
the trace; what it costs on the GPU is measured elsewhere. The last tokens of the trace are run,
where it has learned most.

- measured: the cache's statistics, that is, time in which the stream stood still before an expert,
  by events
- wall: wall time less that of the same calls with all experts resident, the cross-check; it also
  has what a miss costs beside waiting, such as a launch for each expert
- simulated: the same trace, slots, policy, chunks and warm-up. Bandwidth and latency of the link
  are those of raw copies; a layer's time is that of the measured run less its stall, since launches
  and copies under way slow layers down; what of it comes before the plan is that of a run without
  experts. All measured in this run
- perfect: knows what the rest of the token needs; clairvoyant, which is the simulator's oracle:
  what the next token needs, too

With --device cpu the caches are those of the CPU backend, a layer's time is slept, experts take no
time, and all threads share the link: a test of this benchmark, and no figure.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from foreseen import Foreseen, clairvoyant, last_tokens, perfect, recorded
from loads import CHUNK_BYTES, CpuLoad, GpuLoad, Load
from prefetch_methods import METHODS, NO_PREFETCH, ON_DEMAND, Method, Prefetch, prefetcher
from prefetch_table import HEAD, Row, line, print_summary

from expertflow import ExpertCache
from expertflow.cache import hit_rate
from expertflow.link_profiles import LinkProfile
from expertflow.simulation import OURS, Machine, Simulation
from expertflow.traces import Trace, load_trace


@dataclass(frozen=True)
class Run:
    tokens: int
    token_us: float
    counts: dict[str, Any]  # the cache's statistics
    mean_horizon: float


def run(
    load: Load,
    cache: ExpertCache,
    prefetch: Prefetch,
    warmup: int,
    tokens: int,
    *,
    with_experts: bool = True,
) -> Run:
    """Decode the first tokens of the trace. What is returned leaves out the warm-up."""
    load.begin()
    begin, horizon_sum = 0.0, 0
    for token in range(warmup + tokens):
        if token == warmup:
            load.synchronize()
            cache.reset_statistics()
            begin, horizon_sum = time.perf_counter(), 0
        for layer in range(cache.num_layers):
            load.plan(cache, token, layer)
            if with_experts:
                horizon_sum += prefetch(token, layer)
                load.compute(cache, layer)
        load.end_token()
    load.synchronize()
    token_us = (time.perf_counter() - begin) / tokens * 1e6
    return Run(tokens, token_us, cache.statistics(), horizon_sum / tokens / cache.num_layers)


@dataclass(frozen=True)
class Costs:
    """What the simulator is told, all measured."""

    link: LinkProfile
    without_experts_us: float  # a token
    resident_us: dict[str, float]  # a token, by what the method calls

    def machine(self, run: Run, load: Load, num_slots: int, num_layers: int) -> Machine:
        busy_us = run.token_us - run.counts["stall_us"] / run.tokens
        return Machine(
            expert_cache=num_slots * load.expert_bytes,
            expert_bytes=load.expert_bytes,
            link=self.link,
            layer_time_us=busy_us / num_layers,
            expert_share=min(max(1 - self.without_experts_us / busy_us, 0.0), 1.0),
            chunk_bytes=CHUNK_BYTES,
            demand_chunk_bytes=load.demand_chunk_bytes,
        )


def measure_costs(load: Load, trace: Trace, foreseen: dict[str, Foreseen], tokens: int) -> Costs:
    """Run with all experts resident, so that nothing stalls."""
    warmup = tokens // 3

    def token_us(method: Method, with_experts: bool = True) -> float:
        cache = load.cache(trace.num_layers * trace.num_experts, OURS)
        prefetch = prefetcher(cache, method, foreseen)
        return run(
            load, cache, prefetch, warmup, tokens - warmup, with_experts=with_experts
        ).token_us

    methods = {method.calls: method for method in METHODS}
    return Costs(
        link=load.link(),
        without_experts_us=token_us(NO_PREFETCH, with_experts=False),
        resident_us={calls: token_us(method) for calls, method in methods.items()},
    )


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
    seen = run(load, cache, prefetcher(cache, method, foreseen), warmup, tokens)
    counts = seen.counts
    machine = costs.machine(seen, load, num_slots, layers)
    simulation = Simulation(source.trace, machine, warmup_tokens=warmup)
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
    )


def bench(load: Load, trace: Trace, options: argparse.Namespace) -> tuple[Costs, list[Row]]:
    """All methods at all cache sizes."""
    foreseen = {
        "recorded": recorded(trace),
        "perfect": perfect(trace),
        "clairvoyant": clairvoyant(trace),
    }
    warmup, tokens, rows = options.warmup, options.tokens, []
    few = min(tokens, 150)
    costs = measure_costs(load, trace, foreseen, few)
    link = costs.link
    layers = trace.num_layers
    print(
        f"\n{load.name}: {layers} x {trace.num_experts} experts of {load.expert_bytes / 1e6:.1f} "
        f"MB, top-{trace.top_k}, {tokens} tokens after {warmup}; us and bytes are per token\n"
        f"link {link.bandwidth_gbps:.1f} GB/s + {link.latency_us:.1f} us a copy; layer without its "
        f"experts {costs.without_experts_us / layers:.1f} us, with them "
        + ", ".join(f"{us / layers:.1f} ({calls})" for calls, us in costs.resident_us.items())
        + f"\n{HEAD}"
    )
    # On demand every token costs the same, whatever the cache.
    rows.append(compare(load, min(options.shares), ON_DEMAND, foreseen, costs, warmup, few))
    print(line(rows[-1]), flush=True)
    for share in options.shares:
        for method in METHODS:
            rows.append(compare(load, share, method, foreseen, costs, warmup, tokens))
            print(line(rows[-1]), flush=True)
    return costs, rows


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
    parser.add_argument("--tokens", type=int, default=600, help="that are measured")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--expert-kib", type=int, default=1024, help="of --device cpu")
    parser.add_argument("--layer-us", type=float, default=1000.0, help="of --device cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    trace = last_tokens(load_trace(options.trace), options.warmup + options.tokens)
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
