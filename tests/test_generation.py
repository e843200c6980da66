"""Every way to generate gives the tokens of a cache that holds everything."""

import pytest
import torch
from streamed import (
    DTYPES,
    EVERYTHING_CACHED,
    SMALLEST,
    CacheOptions,
    generate,
    same_bits,
    token_ids,
    use,
)
from tiny_models import FAMILIES

PROMPTS = token_ids(13, 4, 21, 1)
CACHES = [SMALLEST, CacheOptions("smallest+1", "two_level_lru"), CacheOptions("50%")]
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.2, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "without a KV cache": {"use_cache": False},
    "static KV cache": {"cache_implementation": "static"},
    "prompt in chunks": {"prefill_chunk_size": 6},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def run(model, way):
    batch = token_ids(19, seed=2) if way == "prompt lookup" else PROMPTS
    torch.manual_seed(11)
    out = generate(model, batch, 8, output_logits=True, return_dict_in_generate=True, **WAYS[way])
    return [out.sequences, *out.logits]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(tiny_streamed, way, dtype):
    expected = run(use(tiny_streamed("olmoe", dtype), EVERYTHING_CACHED), way)
    for options in CACHES:
        assert same_bits(run(use(tiny_streamed("olmoe", dtype), options), way), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["sampling", "beams"])
def test_families(tiny_streamed, family, way):
    expected = run(use(tiny_streamed(family), EVERYTHING_CACHED), way)
    assert same_bits(run(use(tiny_streamed(family, pool="file"), SMALLEST), way), expected)


def test_seed_matters(tiny_streamed):
    """Otherwise sampling would prove no more than greedy search."""
    model = use(tiny_streamed("olmoe"), SMALLEST)
    torch.manual_seed(1)
    first = generate(model, PROMPTS, 8, do_sample=True)
    torch.manual_seed(2)
    assert not torch.equal(first, generate(model, PROMPTS, 8, do_sample=True))


def test_cache_is_replaced_between_tokens(tiny_streamed):
    """A cache is only a cache: the text goes on where it was."""
    expected = generate(use(tiny_streamed("mixtral"), EVERYTHING_CACHED), PROMPTS, 6)
    model = use(tiny_streamed("mixtral"), SMALLEST)

    def replace_cache(ids, scores):
        use(model, CacheOptions("25%" if ids.shape[1] % 2 else "smallest", "lru"))
        return scores

    assert torch.equal(generate(model, PROMPTS, 6, logits_processor=[replace_cache]), expected)
