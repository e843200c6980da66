"""The time of one MoE layer of DeepSeek-V2-Lite in transformers, decoding, all on the GPU.

    python bench/paper/layer_times.py [--out bench/paper/layer_times.json]

A few layers of the real shape with random weights, bf16, batch 1, a KV cache of 512 tokens. A
token is timed with all of the layers and with one, synchronized before and after; the difference,
divided by the layers that differ, is the layer's time: embedding, norm and head fall out. Medians.
With each of transformers' implementations of experts; the default is what a user gets.

Beside it the roofline: the bytes that a layer reads for a token, over the rate of copies in the
GPU's memory, which count as read and written, measured in the same run.

`stall_bench.py` takes its layer time from the file. Entries with "is_measured": false are guesses.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("layer_times.json")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
DEEPSEEK_V2_LITE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,  # only MoE layers here
    "vocab_size": 1024,  # no part of a layer
}


@dataclass(frozen=True)
class LayerTimes:
    """Of one device."""

    device: str
    is_measured: bool
    layer_us: dict[str, float]  # by transformers' implementation of experts
    default: str  # the implementation that transformers takes if it is not told
    date: str = ""
    torch: str = ""
    transformers: str = ""
    context_tokens: int = 0
    layer_bytes: int = 0  # that a token reads
    memory_gbps: float = 0.0
    roofline_us: float = 0.0
    spread: dict[str, float] = field(
        default_factory=dict
    )  # interquartile range of a token / median

    @property
    def eager_us(self) -> float:
        """A layer of the forward that a user gets, not compiled."""
        return self.layer_us[self.default]


def load_layer_times(path: Path = FILE) -> dict[str, LayerTimes]:
    """Entries of the file, by the name that a profile has in `expertflow.link_profiles`."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {name: LayerTimes(**entry) for name, entry in entries.items()}


def save_layer_times(path: Path, name: str, times: LayerTimes) -> None:
    """Add an entry to the file, or replace it; without a file begin one."""
    before = load_layer_times(path) if path.exists() else {}
    entries = {name: asdict(entry) for name, entry in before.items()}
    entries[name] = asdict(times)
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def build_model(sizes: dict[str, Any], num_layers: int, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV2Config

    config = DeepseekV2Config(**sizes, num_hidden_layers=num_layers)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def token_times(model: Any, context_tokens: int, tokens: int) -> list[float]:
    """Microseconds of each of `tokens` decode steps behind `context_tokens`."""
    import torch
    from transformers import DynamicCache

    device = model.device
    synchronize: Callable[[], None] = (
        torch.cuda.synchronize if device.type == "cuda" else lambda: None
    )
    prompt = torch.randint(0, model.config.vocab_size, (1, context_tokens), device=device)
    cache = DynamicCache(config=model.config)
    times = []
    with torch.no_grad():
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for step in range(tokens + 5):
            token = torch.randint(0, model.config.vocab_size, (1, 1), device=device)
            synchronize()
            begin = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            synchronize()
            if step >= 5:  # warm by now
                times.append((time.perf_counter() - begin) * 1e6)
            cache.crop(-1)
    return times


def layer_bytes(model: Any, context_tokens: int) -> int:
    """What a token reads in one layer: weights, of the routed experts the top-k, and the KV."""
    import torch
    from transformers import DynamicCache

    config, layer = model.config, model.model.layers[0]
    routed = sum(p.nbytes for p in layer.mlp.experts.parameters())
    others = sum(p.nbytes for p in layer.parameters()) - routed
    active = routed * config.num_experts_per_tok // config.n_routed_experts
    cache = DynamicCache(config=config)
    prompt = torch.zeros((1, context_tokens), dtype=torch.int64, device=model.device)
    with torch.no_grad():
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return others + active + cache.layers[0].keys.nbytes + cache.layers[0].values.nbytes


def memory_bytes_per_second(device: str, num_bytes: int) -> float:
    """Copies of `num_bytes` inside the memory, read and written."""
    import torch

    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        if device != "cpu":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * num_bytes / statistics.median(times[2:])


def measure(
    sizes: dict[str, Any],
    device: str,
    *,
    num_layers: int = 9,
    context_tokens: int = 512,
    tokens: int = 100,
    copy_bytes: int = 2 << 30,
) -> LayerTimes:
    """Measure all implementations on one device."""
    import torch
    import transformers

    model = build_model(sizes, num_layers, device)
    default = model.config._experts_implementation
    all_layers, one_layer = model.model.layers, model.model.layers[:1]
    layer_us, spread = {}, {}
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        model.model.layers, model.config.num_hidden_layers = all_layers, num_layers
        long = token_times(model, context_tokens, tokens)
        model.model.layers, model.config.num_hidden_layers = one_layer, 1
        short = token_times(model, context_tokens, tokens)
        median = statistics.median(long)
        layer_us[name] = round((median - statistics.median(short)) / (num_layers - 1), 1)
        quartiles = statistics.quantiles(long, n=4)
        spread[name] = round((quartiles[2] - quartiles[0]) / median, 3)
    rate = memory_bytes_per_second(device, copy_bytes)
    num_bytes = layer_bytes(model, context_tokens)
    return LayerTimes(
        device="CPU" if device == "cpu" else torch.cuda.get_device_name(),
        is_measured=True,
        layer_us=layer_us,
        default=default,
        date=datetime.date.today().isoformat(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        context_tokens=context_tokens,
        layer_bytes=num_bytes,
        memory_gbps=round(rate / 1e9, 1),
        roofline_us=round(num_bytes / rate * 1e6, 1),
        spread=spread,
    )


def describe(times: LayerTimes) -> str:
    layers = ", ".join(
        f"{name} {us:.0f} us (a token's quartiles {times.spread[name]:.1%} apart)"
        for name, us in times.layer_us.items()
    )
    return (
        f"{times.device}, {times.date}, torch {times.torch}, transformers {times.transformers}: "
        f"one MoE layer of DeepSeek-V2-Lite, bf16, batch 1, {times.context_tokens} tokens of KV: "
        f"{layers}; default {times.default}. Roofline {times.roofline_us:.1f} us: "
        f"{times.layer_bytes / 1e6:.1f} MB at {times.memory_gbps:.0f} GB/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--profile", default="h200", help="name of the entry in the file")
    parser.add_argument("--out", type=Path, help="the file to add it to")
    options = parser.parse_args()
    times = measure(
        DEEPSEEK_V2_LITE, options.device, context_tokens=options.context, tokens=options.tokens
    )
    print(describe(times))
    print(json.dumps({options.profile: asdict(times)}, indent=2))
    if options.out:
        save_layer_times(options.out, options.profile, times)


if __name__ == "__main__":
    main()
