"""Prefill on a GPU beside its bounds: experts of Qwen3-30B-A3B's shape, random routing.

A prompt passes through the experts of some layers. At 100 % it is compute, beside one dense product
of the same work; at smaller sizes it should take at most the larger of that and the time to move
what is routed to and not resident, at 0.9 of the link's bandwidth, measured in this run.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from decode_bounds import raw_bandwidth
from torch.nn import functional as F
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from expertflow import ExpertCache, _core
from expertflow.experts import streamed_class

DEVICE = torch.device("cuda", 0)
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 128, 8


def make_pool(layers: int) -> tuple[_core.ExpertLayout, _core.PinnedPool]:
    shapes = {"gate_up_proj": 2 * INTERMEDIATE * HIDDEN, "down_proj": INTERMEDIATE * HIDDEN}
    layout = _core.ExpertLayout([(role, "bfloat16", size) for role, size in shapes.items()])
    pool = _core.RamPool(layout, layers * EXPERTS)
    some = (torch.randn(7, layout.slot_bytes // 2) * 0.02).bfloat16().view(torch.uint8)
    for expert in range(layers * EXPERTS):
        torch.from_numpy(pool.expert_memory(expert)).copy_(some[expert % 7])
    pinned = _core.PinnedPool(pool, DEVICE.index, is_required=True)
    pinned.pin(0, layers * EXPERTS)
    return layout, pinned


def make_layers(layers: int, cache: ExpertCache) -> list:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    modules = [streamed_class(Qwen3MoeExperts)(config) for _ in range(layers)]
    for layer, module in enumerate(modules):
        module.bind(cache, layer)
    return modules


def dense_seconds(tokens: int) -> float:
    """One layer's products as dense ones over all routed tokens."""
    x = torch.randn(tokens * TOP_K, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    up = torch.randn(2 * INTERMEDIATE, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    down = torch.randn(HIDDEN, INTERMEDIATE, device=DEVICE, dtype=torch.bfloat16)
    middle = torch.randn(tokens * TOP_K, INTERMEDIATE, device=DEVICE, dtype=torch.bfloat16)
    return timed(lambda: (F.linear(x, up), F.linear(middle, down)))


def grouped_seconds(cache: ExpertCache, routes: list[torch.Tensor]) -> float:
    """The grouped products alone, with the experts where the cache has them."""
    total = 0.0
    for layer, ids in enumerate(routes):
        weights = cache.slots.stacked_weights(slice(layer * EXPERTS, (layer + 1) * EXPERTS))
        ends = torch.bincount(ids.flatten(), minlength=EXPERTS).cumsum(0, dtype=torch.int32)
        x = torch.randn(ids.numel(), HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        middle = torch.randn(ids.numel(), INTERMEDIATE, device=DEVICE, dtype=torch.bfloat16)
        up, down = (weights[role].transpose(1, 2) for role in ("gate_up_proj", "down_proj"))

        def products(x=x, middle=middle, up=up, down=down, ends=ends) -> None:
            F.grouped_mm(x, up, offs=ends)
            F.grouped_mm(middle, down, offs=ends)

        total += timed(products)
    return total


def timed(function, repeats: int = 5) -> float:
    """Median seconds of a call, the device's work included."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    options = parser.parse_args()
    torch.manual_seed(0)
    layout, pool = make_pool(options.layers)
    bandwidth = raw_bandwidth(layout.slot_bytes)
    shapes = {
        "gate_up_proj": (2 * INTERMEDIATE, HIDDEN),
        "down_proj": (HIDDEN, INTERMEDIATE),
    }
    print(
        f"{torch.cuda.get_device_name()}, {options.layers} layers x {EXPERTS} experts of "
        f"{layout.slot_bytes / 2**20:.0f} MiB, top-{TOP_K}, raw copies {bandwidth / 1e9:.1f} GB/s"
    )
    print("tokens  cache   ms     moved GiB  bound ms  bound/time  outputs")
    for tokens in options.tokens:
        x = torch.randn(tokens, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        routes = [
            torch.rand(tokens, EXPERTS, device=DEVICE).topk(TOP_K)[1] for _ in range(options.layers)
        ]
        weights = torch.rand(tokens, TOP_K, device=DEVICE).softmax(-1).bfloat16()
        expected, compute = None, 0.0
        for share in (1.0, 0.5, 0.25):
            cache = ExpertCache(
                *(pool, layout, shapes, options.layers, EXPERTS, TOP_K),
                num_slots=int(share * options.layers * EXPERTS),
                device=DEVICE,
                mlp_hidden=HIDDEN,
            )
            modules = make_layers(options.layers, cache)

            def run(modules=modules, x=x, routes=routes, weights=weights) -> list[torch.Tensor]:
                return [m(x, ids, weights) for m, ids in zip(modules, routes, strict=True)]

            for _ in range(2):
                outputs = run()
            cache.reset_statistics()
            repeats = 3
            seconds = timed(run, repeats)
            counts = cache.statistics()
            moved = counts["demand_bytes"] / (repeats + 1)
            expected = outputs if expected is None else expected
            compute = compute or seconds
            bound = max(compute, moved / (0.9 * bandwidth))
            same = all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
            print(
                f"{tokens:6} {share:6.0%} {seconds * 1e3:8.2f} {moved / 2**30:9.2f} "
                f"{bound * 1e3:9.2f} {bound / seconds:10.2f}   {'same' if same else 'DIFFER'}"
            )
            if share == 1.0:
                dense = dense_seconds(tokens) * options.layers
                grouped = grouped_seconds(cache, routes)
                print(
                    f"       rate of one dense product of the same work: grouped products "
                    f"{dense / grouped:.1%}, whole layers {dense / seconds:.1%}"
                )
            del cache, modules, run


if __name__ == "__main__":
    main()
