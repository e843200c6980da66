"""What biased routing costs a layer and gains a token, beside exact routing in the same run.

One sequence is continued greedily, with exact routing, with a budget of 0, which changes no route
and so costs only what the decision does (on CUDA two read-backs a layer), and with a budget of 5 %.
The routings take turns; each line is that run of the rounds which took the median time. The model
is the one that ships with expertflow unless another checkpoint is given; nothing is prefetched.

    python bench/cuda/biased_cost.py [MODEL --expert-cache 25%]
"""

import argparse

import torch
from transformers import AutoTokenizer

import expertflow
from expertflow import BiasedRouting, hit_rate
from expertflow.demo import DEMO_MODEL
from expertflow.generation import Generation, generate

PROMPT = "ROMEO:\nBut soft, what light"
ROUTINGS = {
    "exact": "exact",
    "biased, budget 0": BiasedRouting(budget=0.0),
    "biased, budget 5 %": BiasedRouting(budget=0.05),
}


def main() -> None:
    options = parse()
    model = expertflow.from_pretrained(
        options.model, expert_cache=options.expert_cache, device=options.device, progress=False
    )
    model.generation_config.eos_token_id = None  # every run to its last token
    runs = measure(model, AutoTokenizer.from_pretrained(options.model), options)
    cache = model.expert_cache
    is_cuda = cache.device.type == "cuda"
    print(
        f"{options.model} on {torch.cuda.get_device_name() if is_cuda else 'CPU'}: "
        f"{cache.num_layers} layers, top-{cache.top_k} of {cache.num_experts} experts of "
        f"{cache.slot_bytes} bytes, {cache.dtype}, {options.expert_cache} cached; "
        f"{options.tokens} tokens, {options.rounds} rounds\n"
    )
    print_table(runs, cache.num_layers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(DEMO_MODEL))
    parser.add_argument("--expert-cache", default="25%")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def measure(model, tokenizer, options: argparse.Namespace) -> dict[str, list[Generation]]:
    """All runs of each routing, the fastest first, after a round that is not counted."""
    runs: dict[str, list[Generation]] = {name: [] for name in ROUTINGS}
    for number in range(options.rounds + 1):
        for name, routing in ROUTINGS.items():
            model.set_routing(routing)
            run = generate(model, tokenizer, PROMPT, max_new_tokens=options.tokens)
            if number > 0:
                runs[name].append(run)
    for exact, same in zip(runs["exact"], runs["biased, budget 0"], strict=True):
        assert torch.equal(exact.token_ids, same.token_ids), "a budget of 0 changed the output"
    return {name: sorted(of_name, key=lambda run: run.seconds) for name, of_name in runs.items()}


def print_table(runs: dict[str, list[Generation]], num_layers: int) -> None:
    head = ("tokens/s", "ms/token", "fastest", "slowest", "stall ms", "hits", "changed", "us/layer")
    print(f"{'':18}" + "".join(f"{name:>10}" for name in head))
    for name, of_name in runs.items():
        run = of_name[len(of_name) // 2]
        exact = runs["exact"][len(of_name) // 2]
        ms = [r.seconds / r.new_tokens * 1e3 for r in (run, of_name[0], of_name[-1], exact)]
        changed = run.statistics["changed_routes"] / max(run.statistics["routes"], 1)
        print(
            f"{name:18}{run.tokens_per_second:10.1f}{ms[0]:10.3f}{ms[1]:10.3f}{ms[2]:10.3f}"
            f"{run.stall_ms_per_token:10.3f}{hit_rate(run.statistics):10.1%}{changed:10.1%}"
            f"{(ms[0] - ms[3]) * 1e3 / num_layers:+10.1f}"
        )
    print("\nus/layer: time of a token beyond that with exact routing, over the layers")


if __name__ == "__main__":
    main()
