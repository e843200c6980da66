"""The ways of fetching experts that prefetch.py compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from foreseen import Foreseen

from expertflow import ExpertCache
from expertflow.simulation import MAX_HORIZON, OURS

# What is done once a layer of a token is planned; returns how many layers ahead was looked.
Prefetch = Callable[[int, int], int]


@dataclass(frozen=True)
class Method:
    name: str
    policy: str
    predictor: str = ""  # "recorded", "perfect", "clairvoyant", or none
    horizon: int | None = 0  # None: adaptive

    @property
    def calls(self) -> str:
        """What it calls in each layer: methods that call the same take the same time."""
        if not self.predictor:
            return "no prefetch"
        return "adaptive" if self.horizon is None else f"fixed step {self.horizon}"


ON_DEMAND = Method("on demand", "on_demand")
NO_PREFETCH = Method("no prefetch", OURS)
FIXED = [Method(f"fixed step {step}", OURS, "recorded", step) for step in (1, 2, 3, 4)]
ADAPTIVE = Method("adaptive", OURS, "recorded", None)
PERFECT, CLAIRVOYANT = (
    [
        Method(f"{predictor}, adaptive", OURS, predictor, None),
        Method(f"{predictor}, fixed step {MAX_HORIZON}", OURS, predictor, MAX_HORIZON),
    ]
    for predictor in ("perfect", "clairvoyant")
)
DECAYED = Method("no prefetch, decayed frequency", "decayed_frequency")
METHODS = [DECAYED, NO_PREFETCH, *FIXED, ADAPTIVE, *PERFECT, *CLAIRVOYANT]


def prefetcher(cache: ExpertCache, method: Method, foreseen: dict[str, Foreseen]) -> Prefetch:
    if not method.predictor:
        return lambda token, layer: 0
    need = foreseen[method.predictor].need
    if method.horizon is not None:
        cache.set_horizon(method.horizon)

    def prefetch(token: int, layer: int) -> int:
        horizon = cache.begin_prefetch()
        if horizon > 0:
            cache.prefetch_predicted(need[token, layer, :horizon])
        return cache.horizon

    return prefetch
