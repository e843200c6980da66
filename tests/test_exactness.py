"""Whatever the cache, the output is bit by bit that of a cache that holds everything."""

from itertools import product

import pytest
import torch
from streamed import (
    CACHE_SIZES,
    DTYPES,
    EVERYTHING_CACHED,
    POLICIES,
    POOLS,
    SCOPES,
    CacheOptions,
    generate,
    logits,
    same_bits,
    token_ids,
    use,
)
from tiny_models import FAMILIES

PROMPTS = token_ids(23, 9, 1)  # more tokens than a decode step may have, and a single one
PROMPT = token_ids(11, seed=1)


def outputs(model):
    return [
        logits(model, PROMPTS),
        logits(model, PROMPT, logits_to_keep=1),
        generate(model, PROMPTS, 5),
        *generate(model, PROMPT, 5, output_logits=True, return_dict_in_generate=True).logits,
    ]


_expected = {}


def expected(tiny_streamed, family, dtype):
    if (family, dtype) not in _expected:
        model = use(tiny_streamed(family, dtype), EVERYTHING_CACHED)
        _expected[family, dtype] = outputs(model)
        assert model.expert_cache.statistics()["misses"] == 0
    return _expected[family, dtype]


def check(tiny_streamed, family, dtype, pool, options):
    model = use(tiny_streamed(family, dtype, pool), options)
    assert same_bits(outputs(model), expected(tiny_streamed, family, dtype))
    if options.size != "all":
        assert model.expert_cache.statistics()["misses"] > 0


EVERY_CACHE = [CacheOptions(*choice) for choice in product(CACHE_SIZES, POLICIES, SCOPES)]
# Every size with every policy, and every pair of two other choices.
COVERING = [
    (
        CacheOptions(size, policy, SCOPES[(i + j) % 2]),
        POOLS[(i + j // 2) % 2],
        DTYPES[(i // 2 + j) % 2],
    )
    for (i, size), (j, policy) in product(enumerate(CACHE_SIZES), enumerate(POLICIES))
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("options", "pool", "dtype"), COVERING, ids=str)
def test_every_family_with_every_size_and_policy(tiny_streamed, family, options, pool, dtype):
    check(tiny_streamed, family, dtype, pool, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("options", EVERY_CACHE, ids=str)
def test_one_family_with_everything(tiny_streamed, dtype, pool, options):
    """Of top-3 routing and with a dense layer between MoE layers."""
    check(tiny_streamed, "qwen3_moe", dtype, pool, options)


def test_different_inputs_give_different_bits(tiny_streamed):
    """The comparisons above can fail."""
    model = use(tiny_streamed("qwen3_moe"), EVERYTHING_CACHED)
    theirs = logits(model, PROMPT)
    assert not same_bits([logits(model, token_ids(11, seed=2))], [theirs])
    assert not same_bits([theirs + torch.finfo(torch.float32).eps], [theirs])
