"""What decodes in prefetch.py: a model's layers beside its experts' pool, on a GPU or the CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from decode_bounds import raw_bandwidth
from decode_model import DEVICE, Decoder, Layer, Shape, captured
from torch import Tensor

from expertflow import ExpertCache, _core, ops
from expertflow.link_profiles import LinkProfile
from expertflow.traces import Trace

CHUNK_BYTES = 5 << 20  # what ExpertCache prefetches at a time on CUDA
LARGE_COPY_BYTES = 256 << 20
FASTEST_LINK_GBPS = 60.0  # what PCIe 5.0 x16 never reaches


class Load(Protocol):
    """A model that decodes over the trace, and the pool of its experts."""

    name: str
    expert_bytes: int
    demand_chunk_bytes: int  # 0: as of prefetches

    def cache(self, num_slots: int, policy: str) -> ExpertCache: ...
    def begin(self) -> None:
        """The next token is the first one."""

    def plan(self, cache: ExpertCache, token: int, layer: int) -> Tensor:
        """Compute `layer` up to its experts, and plan these. Returns the rows of `ops.plan`."""

    def compute(self, cache: ExpertCache, layer: int) -> None: ...
    def end_token(self) -> None: ...
    def synchronize(self) -> None:
        """Wait until all layers are computed. Copies may still be under way."""

    def mark(self) -> Any:
        """Note when what was called so far is computed."""

    def elapsed_us(self, begin: Any, end: Any) -> float:
        """Between two marks, after `synchronize`."""

    def link(self) -> LinkProfile: ...
    def copy_for(self, microseconds: float) -> Callable[[], bool]:
        """Begin copies that keep the link busy for at least so long.

        Returns what tells whether they still are under way.
        """


class GpuLoad:
    demand_chunk_bytes = 24 << 20  # what the cache demands at a time from a pinned pool

    def __init__(self, trace: Trace, context: int) -> None:
        shape = Shape(
            "docs-moe-12x32 at DeepSeek-V2-Lite's sizes",
            "",
            *(trace.num_layers, trace.num_experts, trace.top_k, 2048, 1408, 16, 16, 192),
            vocabulary=256,
            shared=2816,
            context=context,
        )
        self.decoder = Decoder(shape, trace.expert_ids)
        self.expert_bytes: int = self.decoder.layout.slot_bytes
        self.copy_stream = torch.cuda.Stream()
        self.source = torch.ones(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        self.target = torch.empty(CHUNK_BYTES, dtype=torch.uint8, device=DEVICE)
        self.set_context(context)

    def set_context(self, context: int) -> None:
        """Make other layers over the same pool, which takes seconds to pin."""
        decoder = self.decoder
        decoder.shape = replace(decoder.shape, context=context)
        decoder.layers = [Layer(decoder.shape, i) for i in range(decoder.shape.layers)]
        self.graphs = [
            captured(lambda layer=layer: decoder.before(layer))
            for layer in range(decoder.shape.layers + 1)
        ]
        self.name = f"{torch.cuda.get_device_name()}, context {context}"

    def cache(self, num_slots: int, policy: str) -> ExpertCache:
        shape = self.decoder.shape
        return ExpertCache(
            self.decoder.pool,
            self.decoder.layout,
            dict(shape.segments),
            *(shape.layers, shape.experts, shape.top_k),
            num_slots=num_slots,
            policy=policy,
            device=DEVICE,
            mlp_hidden=shape.hidden,
        )

    def begin(self) -> None:
        self.decoder.token.zero_()

    def plan(self, cache: ExpertCache, token: int, layer: int) -> Tensor:
        self.graphs[layer].replay()
        return ops.plan(cache.handle, self.decoder.layers[layer].ids, layer)

    def compute(self, cache: ExpertCache, layer: int) -> None:
        parts = self.decoder.layers[layer]
        ops.compute(cache.handle, parts.hidden, parts.weights, self.decoder.output)

    def end_token(self) -> None:
        self.graphs[-1].replay()

    def synchronize(self) -> None:
        torch.cuda.current_stream().synchronize()

    # After a plan the stream is empty, so the mark is that of the host's call but for the way to
    # the device, which takes about as long as that of the first copy which the plan has posted.
    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_us(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) * 1e3

    def link(self) -> LinkProfile:
        bandwidth = raw_bandwidth(LARGE_COPY_BYTES)
        latency = CHUNK_BYTES / raw_bandwidth(CHUNK_BYTES) - CHUNK_BYTES / bandwidth
        return LinkProfile(bandwidth / 1e9, max(latency, 0.0) * 1e6)

    def copy_for(self, microseconds: float) -> Callable[[], bool]:
        copied = torch.cuda.Event()
        with torch.cuda.stream(self.copy_stream):
            for _ in range(math.ceil(microseconds * FASTEST_LINK_GBPS * 1e3 / CHUNK_BYTES)):
                self.target.copy_(self.source, non_blocking=True)
            copied.record()
        return lambda: not copied.query()


class CpuLoad:
    demand_chunk_bytes = 0

    def __init__(self, trace: Trace, expert_bytes: int, layer_us: float) -> None:
        self.sizes = (trace.num_layers, trace.num_experts, trace.top_k)
        self.ids = torch.from_numpy(trace.expert_ids.astype(np.int64))
        self.layout = _core.ExpertLayout([("weight", "bfloat16", expert_bytes // 2)])
        self.pool = _core.RamPool(self.layout, trace.num_layers * trace.num_experts)
        for expert in range(trace.num_layers * trace.num_experts):
            self.pool.expert_memory(expert).fill(expert % 251)  # so that there are pages to copy
        self.expert_bytes: int = self.layout.slot_bytes
        self.seconds = layer_us * 1e-6
        self.rows: list[list[int]] = []
        self.name = f"CPU, {layer_us:g} us slept a layer"

    def cache(self, num_slots: int, policy: str) -> ExpertCache:
        shapes = {"weight": (self.expert_bytes // 2,)}
        return ExpertCache(
            self.pool,
            self.layout,
            shapes,
            *self.sizes,
            num_slots=num_slots,
            policy=policy,
            num_threads=1,
        )

    def begin(self) -> None: ...

    def plan(self, cache: ExpertCache, token: int, layer: int) -> Tensor:
        time.sleep(self.seconds)
        rows = ops.plan(cache.handle, self.ids[token : token + 1, layer], layer)
        self.rows = rows.tolist()
        return rows

    def compute(self, cache: ExpertCache, layer: int) -> None:
        for row, (_, _, state, _, next_row, _) in enumerate(self.rows):
            if state != ops.HIT:
                ops.wait(cache.handle, row)
            if next_row != ops.NO_ROW:
                ops.release(cache.handle, row)

    def end_token(self) -> None: ...

    def synchronize(self) -> None: ...

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed_us(self, begin: float, end: float) -> float:
        return (end - begin) * 1e6

    def copy_for(self, microseconds: float) -> Callable[[], bool]:
        end = time.perf_counter() + microseconds * 1e-6  # without copies: none slows down a sleep
        return lambda: time.perf_counter() < end

    def link(self) -> LinkProfile:
        target = np.empty(self.expert_bytes, np.uint8)
        num_experts = self.sizes[0] * self.sizes[1]
        begin = time.perf_counter()
        for expert in range(num_experts):
            target[:] = self.pool.expert_memory(expert)[: self.expert_bytes]
        seconds = time.perf_counter() - begin
        return LinkProfile(num_experts * self.expert_bytes / seconds / 1e9, 0.0)
