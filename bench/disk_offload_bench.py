"""Tokens per second on the CPU, beside accelerate's disk_offload and plain transformers.

A random-weight Qwen3-MoE checkpoint with more than 4 GiB of experts is made once. Every system
continues the same prompt, in the same dtype, with the same threads and the same random numbers; the
routing of random weights is near uniform, so it gives the cache no help. Rounds go through the
systems in turn. A cold run starts with the page cache emptied of all files that it reads.

    python bench/disk_offload_bench.py [--dir DIR] [--rounds N] [--new-tokens N]
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import disk_offload
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import expertflow

DTYPE = torch.bfloat16
Speeds = dict[str, list[float]]  # tokens per second of every round, by system
PROMPT = torch.arange(1, 33).unsqueeze(0)


def make_checkpoint(directory: Path, layers: int, experts: int) -> Path:
    path = directory / f"random-{layers}x{experts}"
    if (path / "config.json").exists():
        return path
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=experts,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM._from_config(config, dtype=DTYPE)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02)
    model.save_pretrained(path, max_shard_size="1GB")
    return path


def drop_page_cache(*directories: Path) -> None:
    """Forget the files: they are written back and no longer cached, unless somebody maps them."""
    for directory in directories:
        for file in directory.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def generate(model: torch.nn.Module, new_tokens: int) -> float:
    """Tokens per second from the prompt to the last token."""
    torch.manual_seed(new_tokens)
    begin = time.perf_counter()
    output = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=new_tokens,
        do_sample=True,  # greedy decoding of random weights repeats one token, and its experts
        top_k=0,
    )
    seconds = time.perf_counter() - begin
    assert output.shape[1] == PROMPT.shape[1] + new_tokens
    return new_tokens / seconds


def streamed(path: Path, expert_cache: str, pool: str) -> torch.nn.Module:
    return expertflow.from_pretrained(path, expert_cache=expert_cache, pool=pool, progress=False)


def offloaded(path: Path, folder: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE)
    return disk_offload(model, folder, execution_device=torch.device("cpu"))


def interleaved(
    systems: dict[str, torch.nn.Module],
    rounds: int,
    new_tokens: int,
    before: Callable[[], None] = lambda: None,
) -> Speeds:
    """The speed of each system in each round; `before` is called before every run."""
    speeds: Speeds = {name: [] for name in systems}
    for _ in range(rounds):
        for name, model in systems.items():
            before()
            speeds[name].append(generate(model, new_tokens))
    return speeds


def show(title: str, speeds: Speeds, peer: str) -> None:
    base = statistics.median(speeds[peer])
    print(f"\n{title}")
    print(f"{'':32}{'tokens/s':>10}{'min':>9}{'max':>9}{f'x {peer}':>28}")
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"{name:32}{median:10.3f}{min(values):9.3f}{max(values):9.3f}{median / base:28.2f}")


def against_offload(
    path: Path, folder: Path, rounds: int, new_tokens: int
) -> tuple[Speeds, Speeds]:
    """Partial caches over the file pool beside disk_offload, with warm and with cold page cache."""
    shares = ("25%", "50%")
    ours = {f"expertflow, file pool, {share}": streamed(path, share, "file") for share in shares}
    systems = {**ours, "accelerate disk_offload": offloaded(path, folder)}
    for model in systems.values():
        generate(model, new_tokens)  # fills page cache and expert caches

    warm = interleaved(systems, rounds, new_tokens)
    show("warm page cache", warm, "accelerate disk_offload")

    def forget() -> None:
        drop_page_cache(path, folder)
        for share, model in zip(shares, ours.values(), strict=True):
            model.set_expert_cache(share)

    cold = interleaved(systems, rounds, new_tokens, before=forget)
    show("cold page cache, empty expert caches", cold, "accelerate disk_offload")
    return warm, cold


def against_transformers(path: Path, rounds: int, new_tokens: int) -> Speeds:
    """A 100 % cache beside plain transformers."""
    systems = {
        "expertflow, 100%": streamed(path, "100%", "ram"),
        "transformers": AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE),
    }
    for model in systems.values():
        generate(model, new_tokens)
    speeds = interleaved(systems, rounds, new_tokens)
    show("everything resident", speeds, "transformers")
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("build/disk_offload_bench"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=60, help="per layer, 9 MiB each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=8)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    path = make_checkpoint(options.dir, options.layers, options.experts)
    folder = options.dir / f"offload-{options.layers}x{options.experts}"
    info = expertflow.model_info(path)
    print(
        f"{info.num_moe_layers} layers x {info.num_experts} experts, top-{info.top_k}, "
        f"{info.expert_bytes_total / 2**30:.2f} GiB of experts in {info.dtype}, "
        f"{torch.get_num_threads()} threads, prompt of {PROMPT.shape[1]} tokens, "
        f"{options.new_tokens} new tokens, medians of {options.rounds} rounds"
    )

    warm, cold = against_offload(path, folder, options.rounds, options.new_tokens)
    gc.collect()
    resident = against_transformers(path, options.rounds, options.new_tokens)
    results = {"warm": warm, "cold": cold, "resident": resident}
    (options.dir / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
