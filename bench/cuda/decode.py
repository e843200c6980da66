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
import time
from pathlib import Path

import numpy as np
import torch
from decode_bounds import measure_costs
from decode_model import DEVICE, DTYPE, SHAPES, Decoder, Shape, captured
from torch import Tensor, nn
from torch.nn import functional as F

from expertflow import ops


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
