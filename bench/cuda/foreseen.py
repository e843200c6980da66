"""Predictions over a trace, as the simulator and as the caches take them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from expertflow.simulation import MAX_HORIZON
from expertflow.traces import Trace


@dataclass(frozen=True)
class Foreseen:
    """What a predictor foresaw at each layer for the layers behind it."""

    trace: Trace
    simulated_as: str  # the simulator's name of the predictor
    need: NDArray[np.float32]  # [tokens, layers, distances, experts]


def last_tokens(trace: Trace, count: int) -> Trace:
    """The end of a trace as one sequence: there a predictor that learns online has learned most."""
    if count > trace.num_tokens:
        raise ValueError(f"the trace has {trace.num_tokens} tokens, not {count}")
    if trace.predicted_ids is None or trace.predicted_need is None:
        raise ValueError("the trace holds no predictions: record it with --predictions")
    # Neither the measured run nor the simulated one foresees a token's first layers: on a GPU the
    # predictor begins with layer 0.
    return replace(
        trace.part(slice(trace.num_tokens - count, None)),
        weights=None,
        first_predicted_ids=None,
        first_predicted_need=None,
    )


def recorded(trace: Trace) -> Foreseen:
    """What the trace holds."""
    assert trace.predicted_ids is not None and trace.predicted_need is not None
    ids = trace.predicted_ids.astype(np.int64)
    need = np.zeros((*ids.shape[:3], trace.num_experts), np.float32)
    np.put_along_axis(need, ids, trace.predicted_need.astype(np.float32), axis=-1)
    return Foreseen(trace, "trace", need)


def perfect(trace: Trace) -> Foreseen:
    """All that the rest of the token needs and nothing else: as good as a predictor can be."""
    shape = (trace.num_tokens, trace.num_layers, MAX_HORIZON, trace.top_k)
    ids, need = np.zeros(shape, np.uint16), np.zeros(shape, np.float16)
    for distance in range(1, min(MAX_HORIZON, trace.num_layers - 1) + 1):
        ids[:, :-distance, distance - 1] = trace.expert_ids[:, distance:]
        need[:, :-distance, distance - 1] = 1
    return recorded(replace(trace, predicted_ids=ids, predicted_need=need))


def clairvoyant(trace: Trace) -> Foreseen:
    """Also what the next token needs, which no predictor can know: the simulator's oracle."""
    steps = trace.expert_ids.reshape(-1, trace.top_k).astype(np.int64)
    need = np.zeros((len(steps), MAX_HORIZON, trace.num_experts), np.float32)
    for distance in range(1, MAX_HORIZON + 1):
        np.put_along_axis(need[:-distance, distance - 1], steps[distance:], 1, axis=-1)
    shape = (trace.num_tokens, trace.num_layers, MAX_HORIZON, trace.num_experts)
    return Foreseen(trace, "oracle", need.reshape(shape))
