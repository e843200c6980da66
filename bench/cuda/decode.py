"""Decode speed on a GPU beside its bounds: real shapes, random weights, recorded routing.

Each layer is a CUDA graph of everything but the experts (attention over a fixed context, norms,
router, shared experts), then the streamed experts. The routed ids come from a recorded trace. For
each cache size, milliseconds per token in steady state beside

- the bound without look-ahead: sum over layers of non-expert time + plan read-back
  + max(compute of the hits, missed bytes / bandwidth) + compute of one expert if any was missed;
- the bound of full overlap: max(compute of a resident step, missed bytes / bandwidth).

Compute is that of CUDA graphs with the same kernels, the read-back a kernel's launch and a
synchronization, the bandwidth that of raw copies of one expert, all measured in this run. The peer
is accelerate's CPU offload, with a module for every expert, so that it moves only routed ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expertflow import ExpertCache, _core, ops

DEVICE = torch.device("cuda", 0)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    name: str
    trace: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_gpt_oss: bool = False
    shared: int = 0  # intermediate size of shared experts
    dense: int = 0  # intermediate size of a dense layer before the others
    context: int = 1024  # tokens that attention looks back at

    @property
    def segments(self) -> dict[str, tuple[int, ...]]:
        hidden, inter = self.hidden, self.intermediate
        if not self.is_gpt_oss:
            return {"gate_up_proj": (2 * inter, hidden), "down_proj": (hidden, inter)}
        return {
            "gate_up_proj": (hidden, 2 * inter),
            "gate_up_proj_bias": (2 * inter,),
            "down_proj": (inter, hidden),
            "down_proj_bias": (hidden,),
        }


SHAPES = {
    "gpt-oss-20b": Shape(
        "gpt-oss-20b", "gpt-oss-20b-decode.npz", 24, 32, 4, 2880, 2880, 64, 8, 64, 201_088, True
    ),
    "deepseek-v2-lite": Shape(
        "deepseek-v2-lite",
        "deepseek-v2-lite-prefill.npz",
        *(26, 64, 6, 2048, 1408, 16, 16, 192, 102_400),
        shared=2816,
        dense=10_944,
    ),
}


def random_weight(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE) * 0.02


class Layer:
    """Everything of a layer but its experts, on static tensors so that it can be captured."""

    def __init__(self, shape: Shape, layer: int) -> None:
        width = shape.heads * shape.head_dim
        kv_width = shape.kv_heads * shape.head_dim
        self.shape, self.layer = shape, layer
        self.norm = torch.ones(shape.hidden, device=DEVICE, dtype=DTYPE)
        self.qkv = random_weight(width + 2 * kv_width, shape.hidden)
        self.out = random_weight(shape.hidden, width)
        self.keys = random_weight(1, shape.kv_heads, shape.context, shape.head_dim)
        self.values = random_weight(1, shape.kv_heads, shape.context, shape.head_dim)
        self.router = random_weight(shape.experts, shape.hidden)
        self.mlps = []
        for size in ([shape.dense] if layer == 0 and shape.dense else []) + [shape.shared]:
            if size:
                up, down = random_weight(2 * size, shape.hidden), random_weight(shape.hidden, size)
                self.mlps.append((up, down))
        self.hidden = torch.zeros(1, shape.hidden, device=DEVICE, dtype=DTYPE)
        self.weights = torch.zeros(1, shape.top_k, device=DEVICE, dtype=DTYPE)
        self.ids = torch.zeros(1, shape.top_k, device=DEVICE, dtype=torch.int64)

    def run(self, state: Tensor, trace: Tensor, token: Tensor) -> None:
        shape = self.shape
        normed = F.rms_norm(state, (shape.hidden,), self.norm)
        qkv = F.linear(normed, self.qkv)
        query = qkv[:, : shape.heads * shape.head_dim].view(1, shape.heads, 1, shape.head_dim)
        attended = F.scaled_dot_product_attention(
            query, self.keys, self.values, enable_gqa=shape.heads != shape.kv_heads
        )
        state.add_(F.linear(attended.view(1, -1), self.out))
        self.hidden.copy_(F.rms_norm(state, (shape.hidden,), self.norm))
        probabilities = F.linear(self.hidden, self.router).softmax(-1)
        self.weights.copy_(probabilities.topk(shape.top_k, dim=-1).values)
        self.ids.copy_(trace[:, self.layer].index_select(0, token))
        for up, down in self.mlps:
            gate, other = F.linear(self.hidden, up).chunk(2, dim=-1)
            state.add_(F.linear(F.silu(gate) * other, down))


class Decoder:
    """A model of one shape, its experts' pool, and its graphs."""

    def __init__(self, shape: Shape, trace: np.ndarray) -> None:
        self.shape = shape
        self.trace = torch.from_numpy(trace.astype(np.int64)).to(DEVICE)
        self.layers = [Layer(shape, layer) for layer in range(shape.layers)]
        self.head = random_weight(shape.vocabulary, shape.hidden)
        self.norm = torch.ones(shape.hidden, device=DEVICE, dtype=DTYPE)
        self.state = torch.zeros(1, shape.hidden, device=DEVICE, dtype=DTYPE)
        self.output = torch.zeros_like(self.state)
        self.token = torch.zeros(1, device=DEVICE, dtype=torch.int64)
        self.next_id = torch.zeros(1, device=DEVICE, dtype=torch.int64)
        self.layout = _core.ExpertLayout(
            [(role, "bfloat16", int(np.prod(size))) for role, size in shape.segments.items()]
        )
        self.pool = self._make_pool()

    def _make_pool(self) -> _core.PinnedPool:
        count = self.shape.layers * self.shape.experts
        pool = _core.RamPool(self.layout, count)
        one = (torch.randn(self.layout.slot_bytes // 2) * 0.02).bfloat16().view(torch.uint8)
        for expert in range(count):
            torch.from_numpy(pool.expert_memory(expert)).copy_(one)
        pinned = _core.PinnedPool(pool, DEVICE.index, is_required=True)
        for first in range(0, count, 64):
            pinned.pin(first, min(first + 64, count))
        return pinned

    def cache(self, share: float) -> ExpertCache:
        shape = self.shape
        return ExpertCache(
            self.pool,
            self.layout,
            dict(shape.segments),
            shape.layers,
            shape.experts,
            shape.top_k,
            num_slots=int(share * shape.layers * shape.experts),
            device=DEVICE,
            mlp_hidden=shape.hidden,
        )

    def before(self, layer: int) -> None:
        """What lies between the experts of one layer and those of the next; graph-capturable."""
        if layer > 0:
            self.state.add_(self.output)
        if layer == self.shape.layers:
            logits = F.linear(F.rms_norm(self.state, (self.shape.hidden,), self.norm), self.head)
            self.next_id.copy_(logits.argmax(-1))
            self.token.add_(1).remainder_(len(self.trace))
            self.state.mul_(1e-3)  # the next token's, and bounded
        else:
            self.layers[layer].run(self.state, self.trace, self.token)


def captured(function) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


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


def run_streamed(
    decoder: Decoder, segments: list[torch.cuda.CUDAGraph], share: float, warmup: int, tokens: int
) -> tuple[float, np.ndarray, dict]:
    """Seconds per token in steady state, hits [tokens, layers] and the cache's statistics."""
    cache, layers = decoder.cache(share), decoder.layers
    decoder.token.zero_()
    plans: list[Tensor] = []

    def step() -> None:
        for layer, parts in enumerate(layers):
            segments[layer].replay()
            plans.append(ops.plan(cache.handle, parts.ids, layer))
            ops.compute(cache.handle, parts.hidden, parts.weights, decoder.output)
        segments[-1].replay()

    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    cache.reset_statistics()
    plans.clear()
    begin = time.perf_counter()
    for _ in range(tokens):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / tokens
    num_hits = np.array([int((plan[:, ops.STATE] == ops.HIT).sum()) for plan in plans])
    return seconds, num_hits.reshape(tokens, len(layers)), cache.statistics()


class OffloadedExpert(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden, 2 * shape.intermediate, bias=False, dtype=DTYPE)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False, dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def accelerate_seconds(shape: Shape, trace: np.ndarray, layers: int = 4, tokens: int = 6) -> float:
    """Seconds per token of the experts of all layers under accelerate's CPU offload."""
    from accelerate import cpu_offload

    with torch.device("meta"):
        model = nn.ModuleList(
            nn.ModuleList(OffloadedExpert(shape) for _ in range(shape.experts))
            for _ in range(layers)
        )
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    cpu_offload(model, execution_device=DEVICE)
    x = torch.randn(1, shape.hidden, device=DEVICE, dtype=DTYPE)

    def step(token: int) -> None:
        for layer in range(layers):
            for expert in trace[token, layer]:
                model[layer][int(expert)](x)
        torch.cuda.synchronize()

    step(0)
    begin = time.perf_counter()
    for token in range(tokens):
        step(token)
    return (time.perf_counter() - begin) / tokens / layers * shape.layers


@torch.no_grad()
def bench(shape: Shape, trace: np.ndarray, options: argparse.Namespace) -> None:
    decoder = Decoder(shape, trace)
    costs = measure_costs(decoder)
    segments = [
        captured(lambda layer=layer: decoder.before(layer)) for layer in range(shape.layers + 1)
    ]
    print(
        f"\n{shape.name} on {torch.cuda.get_device_name()}: {shape.layers} x {shape.experts} "
        f"experts of {costs.expert_bytes / 2**20:.1f} MiB, top-{shape.top_k}, bf16, 1 token, "
        f"context {shape.context}\nresident step {costs.resident * 1e3:.3f} ms (without experts "
        f"{costs.non_expert * 1e3:.3f}), one expert {costs.experts[1] * 1e6:.1f} us, {shape.top_k} "
        f"experts {costs.experts[-1] * 1e6:.1f} us, read-back {costs.readback * 1e6:.1f} us, raw "
        f"copies {costs.bandwidth / 1e9:.1f} GB/s"
    )
    print("cache     hits   ms/token   bound without look-ahead   of full overlap   stall/token")
    at_half = 0.0
    for share in options.shares:
        seconds, num_hits, counts = run_streamed(
            decoder, segments, share, options.warmup, options.tokens
        )
        bound = costs.without_look_ahead(num_hits, shape.top_k)
        overlap = costs.full_overlap(num_hits, shape.top_k)
        at_half = seconds if share == 0.5 else at_half
        print(
            f"{share:6.1%}  {num_hits.mean() / shape.top_k:6.1%} {seconds * 1e3:10.3f}   "
            f"{bound * 1e3:10.3f} ({bound / seconds:6.1%})        {overlap * 1e3:8.3f} "
            f"({overlap / seconds:6.1%})   {counts['stall_us'] / options.tokens / 1e3:8.3f} ms"
        )
    if options.peer:
        peer = accelerate_seconds(shape, trace)
        ours = f", {peer / at_half:.1f} x ours at 50 %" if at_half else ""
        print(f"accelerate cpu_offload, experts alone: {peer * 1e3:.1f} ms/token{ours}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, help="directory with the traces")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--warmup", type=int, default=200, help="tokens")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    options = parser.parse_args()
    for name in options.shape or SHAPES:
        trace = np.load(options.traces / SHAPES[name].trace)["expert_ids"]
        bench(SHAPES[name], trace[: options.warmup + options.tokens], options)


if __name__ == "__main__":
    main()
