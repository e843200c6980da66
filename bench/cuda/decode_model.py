"""Models in real shapes with random weights, whose routed ids come from a recorded trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from expertflow import ExpertCache, _core

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
