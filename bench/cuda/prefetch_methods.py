"""The ways of fetching experts that prefetch.py compares."""

from __future__ import annotations

from dataclasses import dataclass

from foreseen import Foreseen

from expertflow import ExpertCache
from expertflow.simulation import MAX_HORIZON, OURS


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


class Prefetcher:
    """Does for a cache what the model does between its layers, as the method says."""

    def __init__(self, cache: ExpertCache, method: Method, foreseen: dict[str, Foreseen]) -> None:
        self._cache = cache
        self._foreseen = foreseen[method.predictor] if method.predictor else None
        if self._foreseen is not None and method.horizon is not None:
            cache.set_horizon(method.horizon)

    def begin_token(self, token: int) -> None:
        """Fetch ahead for the token's first layers, before the first is computed."""
        if self._foreseen is None:
            return
        horizon = self._cache.begin_token(1)
        if horizon > 0 and self._foreseen.first_need is not None:
            self._cache.prefetch_predicted(self._foreseen.first_need[token, :horizon])

    def prefetch(self, token: int, layer: int) -> int:
        """Fetch ahead once the layer is planned. Returns how many layers ahead was looked."""
        if self._foreseen is None:
            return 0
        horizon = self._cache.begin_prefetch()
        if horizon > 0:
            self._cache.prefetch_predicted(self._foreseen.need[token, layer, :horizon])
        return self._cache.horizon
