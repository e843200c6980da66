"""Predictions over a trace, as the simulator and as the caches take them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from expertflow.simulation import MAX_HORIZON
from expertflow.traces import Trace


@dataclass(frozen=True)
class Foreseen:
    """What a predictor foresaw at each layer for those behind it, and when a token began."""

    trace: Trace
    simulated_as: str  # the simulator's name of the predictor
    need: NDArray[np.float32]  # [tokens, layers, distances, experts]
    first_need: NDArray[np.float32] | None  # [tokens, distances, experts], where a token begins


def last_tokens(trace: Trace, count: int) -> Trace:
    """The end of a trace as one sequence: there a predictor that learns online has learned most."""
    if count > trace.num_tokens:
        raise ValueError(f"the trace has {trace.num_tokens} tokens, not {count}")
    if trace.predicted_ids is None or trace.predicted_need is None:
        raise ValueError("the trace holds no predictions: record it with --predictions")
    return replace(trace.part(slice(trace.num_tokens - count, None)), weights=None)


def recorded(trace: Trace) -> Foreseen:
    """What the trace holds."""
    assert trace.predicted_ids is not None and trace.predicted_need is not None
    first_need = None
    if trace.first_predicted_ids is not None and trace.first_predicted_need is not None:
        first_need = _spread(
            trace.first_predicted_ids, trace.first_predicted_need, trace.num_experts
        )
    need = _spread(trace.predicted_ids, trace.predicted_need, trace.num_experts)
    return Foreseen(trace, "trace", need, first_need)


def perfect(trace: Trace) -> Foreseen:
    """All that the rest of the token needs and nothing else: as good as a predictor can be."""
    shape = (trace.num_tokens, trace.num_layers, MAX_HORIZON, trace.top_k)
    ids, need = np.zeros(shape, np.uint16), np.zeros(shape, np.float16)
    for distance in range(1, min(MAX_HORIZON, trace.num_layers - 1) + 1):
        ids[:, :-distance, distance - 1] = trace.expert_ids[:, distance:]
        need[:, :-distance, distance - 1] = 1
    num_first = min(MAX_HORIZON, trace.num_layers)
    first_ids, first_need = np.zeros_like(ids[:, 0]), np.zeros_like(need[:, 0])
    first_ids[:, :num_first] = trace.expert_ids[:, :num_first]
    first_need[:, :num_first] = 1
    return recorded(
        replace(
            trace,
            predicted_ids=ids,
            predicted_need=need,
            first_predicted_ids=first_ids,
            first_predicted_need=first_need,
        )
    )


def clairvoyant(trace: Trace) -> Foreseen:
    """Also what the next token needs, which no predictor can know: the simulator's oracle.

    So nothing is left to foresee where a token begins.
    """
    steps = trace.expert_ids.reshape(-1, trace.top_k).astype(np.int64)
    need = np.zeros((len(steps), MAX_HORIZON, trace.num_experts), np.float32)
    for distance in range(1, MAX_HORIZON + 1):
        np.put_along_axis(need[:-distance, distance - 1], steps[distance:], 1, axis=-1)
    shape = (trace.num_tokens, trace.num_layers, MAX_HORIZON, trace.num_experts)
    return Foreseen(trace, "oracle", need.reshape(shape), first_need=None)


def _spread(
    ids: NDArray[np.uint16], need: NDArray[np.float16], num_experts: int
) -> NDArray[np.float32]:
    """[..., candidates] to [..., experts], 0 where no candidate is."""
    spread = np.zeros((*ids.shape[:-1], num_experts), np.float32)
    np.put_along_axis(spread, ids.astype(np.int64), need.astype(np.float32), axis=-1)
    return spread
