"""The main job on the model that ships with expertflow."""

import sys
from pathlib import Path

import torch

from .generation import Generation, generate
from .loading import from_pretrained
from .results_table import results_table

DEMO_MODEL = Path(__file__).parent / "demo_model"
_PROMPT = "ROMEO:\nBut soft, what light"
_NEW_TOKENS = 160
_EXPERT_CACHE = "25%"


def run_demo() -> None:
    """Print a continuation as it is generated, then compare caches, all measured in this run."""
    from transformers import AutoTokenizer, TextStreamer

    out = sys.stdout
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = from_pretrained(DEMO_MODEL, expert_cache=_EXPERT_CACHE, pool="file", progress=False)
    generate(model, tokenizer, _PROMPT, max_new_tokens=8)  # so that no run pays for the first steps

    runs: list[tuple[str, Generation]] = []
    for name, size, policy in (
        ("expertflow", _EXPERT_CACHE, "decayed_frequency"),
        ("on demand", _EXPERT_CACHE, "on_demand"),
        ("all cached", "100%", "decayed_frequency"),
    ):
        model.set_expert_cache(size, policy=policy)
        streamer = None if runs else TextStreamer(tokenizer)
        run = generate(
            model,
            tokenizer,
            _PROMPT,
            max_new_tokens=_NEW_TOKENS,
            temperature=0.8,
            streamer=streamer,
            keep_logits=True,
        )
        runs.append((name, run))

    ours, resident = runs[0][1], runs[-1][1]
    assert ours.logits is not None and resident.logits is not None
    same = torch.equal(ours.token_ids, resident.token_ids) and torch.equal(
        ours.logits, resident.logits
    )
    out.write(f"\n{results_table(runs)}\n\n")
    out.write("The experts are read from the checkpoint file. On demand, every routed expert is\n")
    out.write("fetched when it is routed and nothing is kept.\n")
    out.write(
        f"Tokens and logits {'are' if same else 'ARE NOT'} bit-identical to those of the run with "
        "a 100 % cache.\n"
    )
