"""What a decode step costs at least, from costs that are measured in the same run."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from decode_model import DEVICE, Decoder, captured

from expertflow import ops


def seconds_of(function, repeats: int = 20) -> float:
    """Median time of a call, by events."""
    times = []
    for _ in range(3):
        function()
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


@dataclass(frozen=True)
class Costs:
    """What the bounds are made of, in seconds and bytes."""

    resident: float  # a whole step
    non_expert: float  # a whole step without experts
    experts: list[float]  # [k + 1] of a layer with so many experts
    readback: float
    bandwidth: float
    expert_bytes: int

    def without_look_ahead(self, num_hits: np.ndarray, top_k: int) -> float:
        """Mean over tokens; num_hits [tokens, layers]."""
        missed = top_k - num_hits
        transfer = missed * self.expert_bytes / self.bandwidth
        experts = np.asarray(self.experts)
        layers = np.maximum(experts[num_hits], transfer) + np.where(missed > 0, experts[1], 0.0)
        return self.non_expert + float((layers + self.readback).sum(axis=1).mean())

    def full_overlap(self, num_hits: np.ndarray, top_k: int) -> float:
        missed = (top_k - num_hits).sum(axis=1).mean() * self.expert_bytes
        return max(self.resident, missed / self.bandwidth)


def measure_costs(decoder: Decoder) -> Costs:
    shape = decoder.shape
    cache = decoder.cache(1.0)

    def experts(layer: int, count: int) -> None:
        first = layer * shape.experts
        slots = torch.arange(first, first + count).view(1, count)
        weights = decoder.layers[layer].weights[:, :count].contiguous()
        hidden = decoder.layers[layer].hidden
        ops.compute_slots(cache.handle, slots, hidden, weights, decoder.output)

    def step(count: int) -> None:
        for layer in range(shape.layers + 1):
            decoder.before(layer)
            if layer < shape.layers and count:
                experts(layer, count)

    def only_experts(count: int) -> None:
        for layer in range(shape.layers):
            experts(layer, count)

    resident, plain = captured(lambda: step(shape.top_k)), captured(lambda: step(0))
    times = [0.0]
    for count in range(1, shape.top_k + 1):
        graph = captured(lambda count=count: only_experts(count))
        times.append(seconds_of(graph.replay) / shape.layers)
    return Costs(
        resident=seconds_of(resident.replay),
        non_expert=seconds_of(plain.replay),
        experts=times,
        readback=readback_seconds(),
        bandwidth=raw_bandwidth(decoder.layout.slot_bytes),
        expert_bytes=decoder.layout.slot_bytes,
    )


def readback_seconds() -> float:
    """A kernel's launch and the wait for its end."""
    number, laps = torch.zeros(1, device=DEVICE), []
    for _ in range(200):
        begin = time.perf_counter()
        number.add_(1)
        torch.cuda.current_stream().synchronize()
        laps.append(time.perf_counter() - begin)
    return statistics.median(laps)


def raw_bandwidth(num_bytes: int) -> float:
    """Bytes per second of copies of `num_bytes` from pinned memory, one after the other."""
    count = max(1, (1 << 30) // num_bytes)
    source = torch.ones(count, num_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(count, num_bytes, dtype=torch.uint8, device=DEVICE)

    def copy() -> None:
        for i in range(count):
            target[i].copy_(source[i], non_blocking=True)

    return count * num_bytes / seconds_of(copy, 5)
