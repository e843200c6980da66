"""A long run on a GPU: outputs equal to those of the resident model, and memory that stays flat.

The model that ships with expertflow continues batches of prompts, again and again with another
policy, scope and pool, at a 25 % cache, with prefetches of what the predictor foresees at a random
or the adaptive horizon, or of random experts at random distances. Every token and every logit must
be that of a 100 % cache.
"""

import argparse
import random
import resource

import torch

import expertflow
from expertflow import experts
from expertflow._core import POLICIES
from expertflow.demo import DEMO_MODEL

BATCHES, NEW_TOKENS = (1, 16, 16), 64  # a single sequence is foreseen on the GPU


def load(pool: str, size: str, prefetch: str | bool = False):
    return expertflow.from_pretrained(
        DEMO_MODEL, expert_cache=size, pool=pool, device="cuda", prefetch=prefetch, progress=False
    )


def run(model, seed: int, batch: int):
    torch.manual_seed(seed)
    prompts = torch.randint(3, 500, (batch, 12), device="cuda")
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences, torch.stack(output.logits)


def prefetching(cache, choice: random.Random):
    """compute_experts, with a random horizon each time."""

    def compute(cache_, layer, *arguments, **keywords):
        def prefetch() -> None:
            for distance in range(1, choice.randrange(9)):
                ids = torch.tensor([choice.randrange(cache.num_experts) for _ in range(2)])
                cache.prefetch((layer + distance) % cache.num_layers, ids, distance)

        return original(cache_, layer, *arguments, **keywords | {"on_planned": prefetch})

    return compute


original = experts.compute_experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000, help="at least 5,120")
    options = parser.parse_args()
    choice = random.Random(0)
    resident = load("ram", "100%")
    models = [load("ram", "25%", "auto"), load("file", "25%", "auto")]
    done, num_rounds, first_free, first_rss = 0, 0, 0, 0
    while done < options.tokens:
        experts.compute_experts = original
        batch = choice.choice(BATCHES)
        expected = run(resident, done, batch)
        model = choice.choice(models)
        policy, scope = choice.choice(POLICIES), choice.choice(("global", "layer"))
        model.set_expert_cache("25%", policy=policy, cache_scope=scope)
        model.expert_cache.set_horizon(choice.choice(("auto", *range(1, 9))))
        if choice.random() < 0.5:
            experts.compute_experts = prefetching(model.expert_cache, choice)
        found = run(model, done, batch)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs), f"{policy}, {scope}: differs after {done} tokens"
        done += batch * NEW_TOKENS
        num_rounds += 1
        print(f"{done} tokens equal", flush=True)
        if num_rounds == 8:  # by now everything was used once
            first_free = torch.cuda.mem_get_info()[0]
            first_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = first_free - torch.cuda.mem_get_info()[0]
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first_rss
    print(f"device memory grew by {grown} bytes, the process by {rss} KiB")


if __name__ == "__main__":
    main()
