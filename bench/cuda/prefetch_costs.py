"""What prefetch.py tells the simulator: costs that are measured in the same run."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

from foreseen import Foreseen
from loads import CHUNK_BYTES, Load
from measured_run import Run, run
from prefetch_methods import METHODS, NO_PREFETCH, Prefetcher

from expertflow import ExpertCache
from expertflow.link_profiles import LinkProfile
from expertflow.simulation import OURS, Machine
from expertflow.traces import Trace

TOKENS_BESIDE_COPIES = 8  # in tens of milliseconds of copies, as many as a stream takes at once
PAIRS = 15  # of runs without and beside copies


@dataclass(frozen=True)
class Costs:
    link: LinkProfile
    copy_slowdown: float  # of a layer while copies are under way, as a share
    planned_us: float  # as of a Run, with all experts resident
    miss_us: float  # as of a Run, with half of them resident
    resident_us: dict[str, float]  # a token with all experts resident, by what the method calls

    def machine(self, seen: Run, load: Load, num_slots: int, num_layers: int) -> Machine:
        """What that run was on."""
        planned_us = self.planned_us if seen.planned_us is None else seen.planned_us
        beside_copies = self._share_beside_copies(seen, load, num_layers)
        slowdown = self.copy_slowdown
        missing = (seen.counts["misses"] + seen.counts["late_hits"]) / seen.tokens / num_layers
        layer_us = max(seen.layer_us - missing * self.miss_us, planned_us)
        return Machine(
            expert_cache=num_slots * load.expert_bytes,
            expert_bytes=load.expert_bytes,
            link=self.link,
            layer_time_us=layer_us * (1 - beside_copies * slowdown / (1 + slowdown)),
            expert_share=planned_us / layer_us,
            chunk_bytes=CHUNK_BYTES,
            demand_chunk_bytes=load.demand_chunk_bytes,
            miss_us=self.miss_us,
            copy_slowdown=self.copy_slowdown,
        )

    def _share_beside_copies(self, seen: Run, load: Load, num_layers: int) -> float:
        """Of the time in which the run computed. While it stalled, there were copies, too."""
        chunks = {
            "prefetch_bytes": CHUNK_BYTES,
            "demand_bytes": load.demand_chunk_bytes or CHUNK_BYTES,
        }
        link_us = 0.0
        for name, chunk_bytes in chunks.items():
            per_expert = math.ceil(load.expert_bytes / chunk_bytes)
            num_copies = seen.counts[name] / load.expert_bytes * per_expert
            link_us += seen.counts[name] / (self.link.bandwidth_gbps * 1e3)
            link_us += num_copies * self.link.latency_us
        computed_us = seen.layer_us * num_layers * seen.tokens
        return min(max((link_us - seen.counts["stall_us"]) / computed_us, 0.0), 1.0)


def measure_costs(load: Load, trace: Trace, foreseen: dict[str, Foreseen], tokens: int) -> Costs:
    """Run with all experts resident, so that nothing stalls, and for the misses with half."""
    num_experts = trace.num_layers * trace.num_experts

    def resident_cache() -> ExpertCache:
        return load.cache(num_experts, OURS)

    runs = {}
    for method in {method.calls: method for method in METHODS}.values():
        cache = resident_cache()
        prefetcher = Prefetcher(cache, method, foreseen)
        run(load, cache, prefetcher, 0, tokens)  # until all that they route to is resident
        runs[method.calls] = run(load, cache, prefetcher, 0, tokens)
    planned_us = runs[NO_PREFETCH.calls].planned_us
    assert planned_us is not None
    return Costs(
        link=load.link(),
        copy_slowdown=measure_copy_slowdown(load, resident_cache()),
        planned_us=planned_us,
        miss_us=measure_miss_us(load, load.cache(num_experts // 2, OURS), tokens),
        resident_us={calls: one.token_us for calls, one in runs.items()},
    )


def measure_miss_us(load: Load, half_resident: ExpertCache, tokens: int) -> float:
    """As of a Run."""
    seen = run(load, half_resident, Prefetcher(half_resident, NO_PREFETCH, {}), 0, tokens)
    return max(seen.miss_us or 0.0, 0.0)


def measure_copy_slowdown(load: Load, cache: ExpertCache) -> float:
    """How much longer a resident layer takes beside copies, as a share."""
    prefetcher = Prefetcher(cache, NO_PREFETCH, {})

    def layer_us() -> float:
        return run(load, cache, prefetcher, 0, TOKENS_BESIDE_COPIES).layer_us

    token_us = layer_us() * cache.num_layers
    without, beside = [], []
    for _ in range(PAIRS):
        without.append(layer_us())
        is_copying = load.copy_for(2.5 * TOKENS_BESIDE_COPIES * token_us)
        slowed_us = layer_us()
        if is_copying():  # else the run was held up, and outlasted them
            beside.append(slowed_us)
        while is_copying():
            time.sleep(1e-3)
    if not beside:
        raise RuntimeError("no run was over before the copies beside it: the machine is too busy")
    return max(statistics.median(beside) / statistics.median(without) - 1, 0.0)
