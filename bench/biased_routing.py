"""Perplexity against hit rate of biased routing, token by token as in decoding.

Windows spread evenly over the text, each a sequence of its own: its first 17 tokens as a prompt,
which is routed exactly, then one token at a time with the right next token given. The cache and the
bias go on from window to window. Perplexity is compared with that of exact routing on the same
tokens.

    python bench/biased_routing.py MODEL --text heldout-text.txt
"""

import argparse
import inspect
import math
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, DynamicCache

import expertflow
from expertflow import BiasedRouting

WINDOW_TOKENS = 512
PROMPT_TOKENS = 17  # more than biased routing changes
# keep_top, strength, budget: where the budget decides, where both do, and without a budget.
SETTINGS = (
    (1, 1.0, 0.02),
    (1, 1.0, 0.05),
    (1, 1.0, 0.1),
    (1, 1.0, 0.2),
    (1, 0.1, 0.1),
    (1, 0.05, 1.0),
    (1, 0.1, 1.0),
)


def main():
    options = parse()
    torch.set_num_threads(1)
    model = expertflow.from_pretrained(options.model, policy=options.policy, progress=False)
    text = options.text.read_text("utf-8")
    token_ids = torch.tensor(AutoTokenizer.from_pretrained(options.model)(text)["input_ids"])
    num_windows = max(1, options.tokens // WINDOW_TOKENS)
    windows = token_ids[: len(token_ids) // num_windows * num_windows].view(num_windows, -1)
    windows = windows[:, :WINDOW_TOKENS]
    print(f"{num_windows} windows of {windows.shape[1]} tokens, policy {options.policy}\n")
    print("| cache | keep_top | strength | budget | changed | hit rate | fetched | perplexity |")
    print("|---|---|---|---|---|---|---|---|")
    begin = time.process_time()
    for size in options.expert_cache:
        exact = print_row(model, windows, size, None, None)
        for setting in SETTINGS:
            print_row(model, windows, size, setting, exact)
    print(f"\n{time.process_time() - begin:.0f} s of CPU time")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--expert-cache", nargs="+", default=["25%", "50%"])
    parser.add_argument("--policy", default="decayed_frequency")
    parser.add_argument("--tokens", type=int, default=4096)
    return parser.parse_args()


def print_row(model, windows, size, setting, exact):
    """Measure and print one setting, `None` for exact routing; return the mean losses."""
    model.set_expert_cache(size)
    name, routing = ("exact", "", ""), "exact"
    if setting is not None:
        name = setting
        routing = BiasedRouting(keep_top=setting[0], strength=setting[1], budget=setting[2])
    model.set_routing(routing)
    losses = decode(model, windows)
    statistics = model.expert_cache.statistics()
    changed = statistics["changed_routes"] / max(1, statistics["routes"])
    fetched_kib = statistics["demand_bytes"] / 1024 / windows.numel()
    perplexity = f"{losses.mean().exp():.3f}"
    if exact is not None:
        gap = losses - exact
        error = gap.std() / math.sqrt(len(gap))
        perplexity += f" ({gap.mean().exp() - 1:+.1%} ± {error:.1%})"
    print(
        f"| {size} | {' | '.join(map(str, name))} | {changed:.1%} "
        f"| {expertflow.hit_rate(statistics):.3f} | {fetched_kib:.0f} KiB | {perplexity} |",
        flush=True,
    )
    return losses


@torch.no_grad()
def decode(model, windows):
    """Return the loss of every token that a single one was computed for."""
    # transformers before 5.24 or so calls it past_key_values
    names = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    losses = []
    for window in windows:
        past = {name: DynamicCache(config=model.config)}
        prompt = window[:PROMPT_TOKENS]
        logits = model(prompt.unsqueeze(0), **past, logits_to_keep=1).logits
        for index in range(PROMPT_TOKENS, len(window)):
            losses.append(
                torch.nn.functional.cross_entropy(logits[0].float(), window[index : index + 1])
            )
            logits = model(window[index].view(1, 1), **past).logits
    return torch.stack(losses)


if __name__ == "__main__":
    main()
