"""One run of prefetch.py: decode over the trace, and see where the time goes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
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
    counts: dict[str, Any]  # the cache's statistics
    mean_horizon: float


@dataclass
class _Token:
    marks: list[Any]  # where it begins, and of each layer where it was planned and where computed
    plans: list[Tensor]
    stall_us: float = 0.0


def run(load: Load, cache: ExpertCache, prefetcher: Prefetcher, warmup: int, tokens: int) -> Run:
    """Decode the first tokens of the trace. What is returned leaves out the warm-up."""
    load.begin()
    seen: list[_Token] = []
    begin, horizon_sum, stall_us = 0.0, 0, 0.0
    for token in range(warmup + tokens + 1):
        load.synchronize()  # a model reads the token's id here, and the needs of its first layers
        if token > warmup:
            before_us, stall_us = stall_us, cache.statistics()["stall_us"]
            seen[-1].stall_us = stall_us - before_us
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
            (load.elapsed_us(one.marks[0], one.marks[-1]) - one.stall_us) / layers for one in seen
        ),
        planned_us=_planned_us(load, seen),
        counts=cache.statistics(),
        mean_horizon=horizon_sum / tokens / layers,
    )


def _planned_us(load: Load, seen: list[_Token]) -> float | None:
    """The median; None if every layer missed something."""
    times = [
        load.elapsed_us(planned, computed)
        for one in seen
        for plan, planned, computed in zip(one.plans, one.marks[1::2], one.marks[2::2], strict=True)
        if bool((plan[:, ops.STATE] == ops.HIT).all())
    ]
    return statistics.median(times) if times else None
