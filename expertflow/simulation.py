"""Decoding over a recorded trace, simulated: what a cache, a predictor and a horizon would cost."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .cache_size import ModelSizes, size_cache
from .link_profiles import LinkProfile
from .traces import Trace

MAX_HORIZON = _core.MAX_HORIZON
OURS = "predicted_need"  # the eviction policy that is called "ours"
POLICIES = (*_core.POLICIES, "ours", "belady")
PREDICTORS = ("none", "ids", "trace", "oracle")


@dataclass(frozen=True, slots=True)
class Machine:
    """What a decode step runs on, and how the cache is laid out.

    A layer computes for `layer_time_us`, `expert_share` of it in its routed experts, after the
    router has chosen them.
    """

    expert_cache: str | float | int  # "25%", "20GB", ...
    expert_bytes: int
    link: LinkProfile
    layer_time_us: float
    cache_scope: str = "global"
    expert_share: float = 0.5
    chunk_bytes: int = 2 << 20
    demand_chunk_bytes: int = 0  # of an expert that is needed now; 0: as the others
    miss_us: float = 0.0  # computing takes longer by that for each expert that is not resident
    copy_slowdown: float = 0.0  # computing takes longer by that share while copies are under way


class Simulation:
    """Runs one trace on one machine, with any policy, predictor and horizon.

    The statistics leave out the first `warmup_tokens`. Deterministic.
    """

    def __init__(self, trace: Trace, machine: Machine, *, warmup_tokens: int = 0) -> None:
        if machine.expert_bytes < 1:
            raise ValueError(f"expert_bytes is {machine.expert_bytes}, not at least 1")
        if not 0 <= warmup_tokens < trace.num_tokens:
            raise ValueError(
                f"a warm-up of {warmup_tokens} tokens leaves nothing of a trace of "
                f"{trace.num_tokens}"
            )
        sizes = ModelSizes(
            path="the trace",
            num_layers=trace.num_layers,
            num_experts=trace.num_experts,
            top_k=trace.top_k,
            slot_bytes=machine.expert_bytes,
            pool_bytes_per_expert=machine.expert_bytes,
            other_bytes=0,
        )
        cache = size_cache(
            sizes, machine.expert_cache, pool="ram", policy="lru", scope=machine.cache_scope
        )
        self._trace, self._machine, self._warmup_tokens = trace, machine, warmup_tokens
        self._num_slots = cache.num_slots
        self._need_q16 = _fixed_point(trace.predicted_need)
        self._first_need_q16 = _fixed_point(trace.first_predicted_need)
        self._counts = functools.lru_cache(maxsize=None)(self._simulate)

    @property
    def num_slots(self) -> int:
        """How many experts the cache holds."""
        return self._num_slots

    def run(
        self, policy: str, predictor: str = "none", horizon: int | None = None
    ) -> dict[str, Any]:
        """One row of results; `horizon` None is the adaptive one.

        A fixed horizon prefetches the top-k predictions of each layer up to there; the adaptive one
        admits by need and by the idle time of the link. Without a predictor the horizon is 0.
        `gap_closed` is the share of the gap in hit rate between LRU and Belady, both without
        prefetch; None where there is no gap. Raises ValueError for what does not exist.
        """
        if predictor == "none":
            horizon = 0
        counts = self._counts(policy, predictor, horizon)
        on_demand = self._counts("on_demand", "none", 0)
        needed = _needed(counts)
        tokens = counts["tokens"]
        return {
            "policy": policy,
            "predictor": predictor,
            "horizon": "auto" if horizon is None else horizon,
            "mean_horizon": counts["horizon_sum"] / (tokens * self._trace.num_layers),
            "hit_rate": _hit_rate(counts),
            "plain_hit_rate": counts["hits"] / needed,
            "prefetch_hit_rate": counts["prefetch_hits"] / needed,
            "late_hit_rate": counts["late_hits"] / needed,
            "stall_us_per_token": counts["stall_ns"] / 1000 / tokens,
            "stall_vs_on_demand": counts["stall_ns"] / on_demand["stall_ns"]
            if on_demand["stall_ns"]
            else None,
            "demand_bytes_per_token": counts["demand_bytes"] / tokens,
            "prefetch_bytes_per_token": counts["prefetch_bytes"] / tokens,
            "wasted_bytes_per_token": counts["wasted_bytes"] / tokens,
            "gap_closed": self._gap_closed(counts),
        }

    def _gap_closed(self, counts: dict[str, int]) -> float | None:
        lru = _hit_rate(self._counts("lru", "none", 0))
        belady = _hit_rate(self._counts("belady", "none", 0))
        return (_hit_rate(counts) - lru) / (belady - lru) if belady > lru else None

    def _simulate(self, policy: str, predictor: str, horizon: int | None) -> dict[str, int]:
        if policy not in POLICIES:
            raise ValueError(f"policy {policy!r} is unknown. Use one of: {', '.join(POLICIES)}.")
        if predictor == "trace" and self._need_q16 is None:
            raise ValueError("the trace holds no predictions, so predictor 'trace' has none")
        machine, trace = self._machine, self._trace
        return _core.simulate(
            expert_ids=trace.expert_ids,
            num_experts=trace.num_experts,
            predicted_ids=trace.predicted_ids,
            predicted_need_q16=self._need_q16,
            first_predicted_ids=trace.first_predicted_ids,
            first_predicted_need_q16=self._first_need_q16,
            policy=OURS if policy == "ours" else policy,
            predictor=predictor,
            horizon=_core.AUTO_HORIZON if horizon is None else horizon,
            num_slots=self._num_slots,
            expert_bytes=machine.expert_bytes,
            scope=machine.cache_scope,
            bytes_per_second=machine.link.bandwidth_gbps * 1e9,
            latency_ns=round(machine.link.latency_us * 1000),
            chunk_bytes=machine.chunk_bytes,
            demand_chunk_bytes=machine.demand_chunk_bytes,
            layer_time_ns=round(machine.layer_time_us * 1000),
            expert_share=machine.expert_share,
            miss_time_ns=round(machine.miss_us * 1000),
            copy_slowdown=machine.copy_slowdown,
            warmup_tokens=self._warmup_tokens,
        )


def combinations(
    trace: Trace, policy: str = "all", predictor: str = "all"
) -> Iterable[tuple[str, str]]:
    """Policies with predictors, "all" meaning each that there is.

    On-demand keeps nothing, so it has no predictor; "trace" needs a trace with predictions.
    """
    policies = POLICIES if policy == "all" else (policy,)
    has_predictions = trace.predicted_ids is not None
    predictors = (
        [name for name in PREDICTORS if name != "trace" or has_predictions]
        if predictor == "all"
        else [predictor]
    )
    for one_policy in policies:
        yield from (
            (one_policy, p) for p in (["none"] if one_policy == "on_demand" else predictors)
        )


def _needed(counts: dict[str, int]) -> int:
    return counts["hits"] + counts["prefetch_hits"] + counts["late_hits"] + counts["misses"]


def _hit_rate(counts: dict[str, int]) -> float:
    return (counts["hits"] + counts["prefetch_hits"]) / _needed(counts)


def _fixed_point(need: NDArray[np.float16] | None) -> NDArray[np.uint16] | None:
    """Probabilities times 65535, block by block: float32 of all would be large."""
    if need is None:
        return None
    fixed = np.empty(need.shape, np.uint16)
    for begin in range(0, len(need), 4096):
        block = need[begin : begin + 4096].astype(np.float32)
        fixed[begin : begin + 4096] = np.rint(block * 65535)
    return fixed
