"""What a layer does to have the experts of later layers fetched."""

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .cache import ExpertCache


@runtime_checkable
class NeedPredictor(Protocol):
    """Foresees how probable it is that later layers need each expert; the cache decides the rest.

    `ExpertPredictor` is one.
    """

    def begin_layer(self, layer: int, hidden_states: Tensor) -> None:
        """Take note that `foresee` will be called with the same arguments.

        Between the two the host waits for the ids of the layer's experts: the time for a GPU to
        compute the answer in.
        """
        ...

    def foresee(self, layer: int, hidden_states: Tensor, max_distance: int) -> NDArray[np.float32]:
        """Return [at most max_distance, experts], row d - 1 for the layer d after `layer`.

        `hidden_states` are the router inputs [tokens, hidden] of `layer`.
        """
        ...

    def learn(self, layer: int) -> None:
        """Learn from how `layer`, which was given last, routes. Its prefetches are on their way."""
        ...


# Or a function which decides itself. Given a layer's number and its router input [tokens, hidden]:
# pairs of (distance in MoE layers, ids of the experts to fetch for the layer so far ahead, the most
# probable first).
Predictor = NeedPredictor | Callable[[int, Tensor], Iterable[tuple[int, Tensor]]]


def begin_foreseeing(predictor: Predictor | None, layer: int, hidden_states: Tensor) -> None:
    """Call before `compute_experts` of the layer whose `on_planned` is `prefetch_foreseen`.

    Both with the cache's lock held, so that no other thread's pass comes between them.
    """
    if isinstance(predictor, NeedPredictor) and len(hidden_states) > 0:
        predictor.begin_layer(layer, hidden_states)


def prefetch_foreseen(
    predictor: Predictor | None, cache: ExpertCache, layer: int, hidden_states: Tensor
) -> None:
    """Fetch what `predictor` expects of later layers, behind what `layer` waits for."""
    if predictor is None:
        return
    if isinstance(predictor, NeedPredictor):
        horizon = cache.begin_prefetch()
        cache.prefetch_predicted(predictor.foresee(layer, hidden_states, horizon))
        predictor.learn(layer)
        return
    for distance, expert_ids in predictor(layer, hidden_states):
        target = layer + distance
        if target < cache.num_layers:
            cache.prefetch(target, expert_ids, distance)
