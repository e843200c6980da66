"""One run of prefetch.py: decode over the trace, and see where the time goes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from loads import Load
from prefetch_methods import Prefetcher
from torch import Tensor

from expertflow import ExpertCache, ops


@dataclass(frozen=True)
class Run:
    """What was measured after the warm-up.

    Times that the simulator is told are medians: pauses of a virtual machine, a few a second, would
    else make every layer look longer than those are which wait for experts.
    """

    tokens: int
    token_us: float  # wall time, the mean
    layer_us: float  # without stalls, of the median token
    planned_us: float | None  # from a plan that misses nothing until its experts are computed
    miss_us: float | None  # what a layer takes longer, beside stalls, for each expert it misses
    counts: dict[str, Any]  # the cache's statistics
    mean_horizon: float


@dataclass
class _Token:
    marks: list[Any]  # where it begins, and of each layer where it was planned and where computed
    plans: list[Tensor]
    stalls_us: list[float] = field(default_factory=list)  # of each layer

    def missing(self) -> list[int]:
        """How many experts of each layer were not there when it was planned."""
        return [int((plan[:, ops.STATE] != ops.HIT).sum()) for plan in self.plans]


def run(load: Load, cache: ExpertCache, prefetcher: Prefetcher, warmup: int, tokens: int) -> Run:
    """Decode the first tokens of the trace. What is returned leaves out the warm-up."""
    load.begin()
    seen: list[_Token] = []
    begin, horizon_sum = 0.0, 0
    stalls_us = [0.0] * cache.num_layers
    for token in range(warmup + tokens + 1):
        load.synchronize()  # a model reads the token's id here, and the needs of its first layers
        if token > warmup:
            before_us = stalls_us
            stalls_us = [layer["stall_us"] for layer in cache.statistics()["layers"]]
            seen[-1].stalls_us = [b - a for a, b in zip(before_us, stalls_us, strict=True)]
        if token == warmup + tokens:
            break
        if token == warmup:
            cache.reset_statistics()
            begin, horizon_sum = time.perf_counter(), 0
        one = _Token([load.mark()], [])
        prefetcher.begin_token(token)
        for layer in range(cache.num_layers):
            one.plans.append(load.plan(cache, token, layer))
            one.marks.append(load.mark())
            horizon_sum += prefetcher.prefetch(token, layer)
            load.compute(cache, layer)
            one.marks.append(load.mark())
        load.end_token()
        if token >= warmup:
            seen.append(one)
    token_us = (time.perf_counter() - begin) / tokens * 1e6
    layers = cache.num_layers
    return Run(
        tokens=tokens,
        token_us=token_us,
        layer_us=statistics.median(
            (load.elapsed_us(one.marks[0], one.marks[-1]) - sum(one.stalls_us)) / layers
            for one in seen
        ),
        planned_us=_planned_us(load, seen),
        miss_us=_miss_us(load, seen),
        counts=cache.statistics(),
        mean_horizon=horizon_sum / tokens / layers,
    )


def _planned_us(load: Load, seen: list[_Token]) -> float | None:
    """The median; None if every layer missed something."""
    times = [
        load.elapsed_us(planned, computed)
        for one in seen
        for missing, planned, computed in zip(
            one.missing(), one.marks[1::2], one.marks[2::2], strict=True
        )
        if missing == 0
    ]
    return statistics.median(times) if times else None


def _miss_us(load: Load, seen: list[_Token]) -> float | None:
    """The median; None if all layers missed something, or none did."""
    times = [
        (missing, load.elapsed_us(begin, computed) - stall_us)
        for one in seen
        for missing, begin, computed, stall_us in zip(
            one.missing(), one.marks[:-1:2], one.marks[2::2], one.stalls_us, strict=True
        )
    ]
    hits_us = [us for missing, us in times if missing == 0]
    if not 0 < len(hits_us) < len(times):
        return None
    hit_us = statistics.median(hits_us)
    return statistics.median((us - hit_us) / missing for missing, us in times if missing > 0)
