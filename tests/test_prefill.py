"""Long prompts: more experts at once than the cache holds, in waves, chunks and token blocks."""

import pytest
import torch
from streamed import (
    DTYPES,
    EVERYTHING_CACHED,
    POLICIES,
    POOLS,
    SCOPES,
    SMALLEST,
    CacheOptions,
    generate,
    logits,
    same_bits,
    token_ids,
    use,
)
from tiny_models import FAMILIES
from transformers import DynamicCache

import expertflow.experts
from expertflow import ops

LONG_PROMPTS = token_ids(400, 130)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_that_needs_more_experts_than_the_cache_holds(tiny_streamed, family, pool):
    expected = logits(use(tiny_streamed(family), EVERYTHING_CACHED), LONG_PROMPTS)
    model = use(tiny_streamed(family, pool=pool), SMALLEST)
    cache = model.expert_cache
    assert torch.equal(logits(model, LONG_PROMPTS), expected)
    counts = cache.statistics()
    needed = [sum(layer[key] for key in ("hits", "misses")) for layer in counts["layers"]]
    assert max(needed) > 2 * cache.num_slots  # at least three waves
    assert counts["demand_bytes"] == counts["misses"] * cache.slot_bytes


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_prompt_and_decode_in_turn(tiny_streamed, dtype, policy, scope):
    def run(model):
        for seed in range(2):
            yield generate(model, token_ids(3, seed=seed), 4)
            yield logits(model, token_ids(200, seed=seed))

    expected = list(run(use(tiny_streamed("deepseek_v2", dtype), EVERYTHING_CACHED)))
    for size in ("smallest", "50%"):
        model = use(tiny_streamed("deepseek_v2", dtype), CacheOptions(size, policy, scope))
        assert same_bits(run(model), expected)


def chunked_logits(model, chunks, between=lambda: None):
    """Logits of two prompts that are fed in turn, a few tokens at a time."""
    prompts = [token_ids(sum(chunks), seed=seed)["input_ids"] for seed in (3, 4)]
    pasts = [DynamicCache(config=model.config) for _ in prompts]
    position = 0
    for length in chunks:
        for prompt, past in zip(prompts, pasts, strict=True):
            part = {"input_ids": prompt[:, position : position + length]}
            between()
            yield logits(model, part, past_key_values=past)
        position += length


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_chunks_with_prefetches_between(tiny_streamed, family, pool):
    """Also with prefetches that are of no use, and some that are still under way."""
    chunks = (40, 7, 1, 1, 30)
    expected = list(chunked_logits(use(tiny_streamed(family), EVERYTHING_CACHED), chunks))
    generator = torch.Generator().manual_seed(7)
    fetched_ahead = 0
    for options in (SMALLEST, CacheOptions("smallest+1", "two_level_lru"), CacheOptions("50%")):
        model = use(tiny_streamed(family, pool=pool), options)
        cache = model.expert_cache

        def prefetch_at_random(cache=cache):
            for distance in (1, 2, 3):
                layer = int(torch.randint(cache.num_layers, (), generator=generator))
                experts = torch.randint(cache.num_experts, (4,), generator=generator)
                cache.prefetch(layer, experts, distance)

        assert same_bits(chunked_logits(model, chunks, prefetch_at_random), expected)
        counts = cache.statistics()
        fetched_ahead += counts["prefetch_bytes"] + counts["late_hits"]
    assert fetched_ahead > 0


@pytest.mark.parametrize("options", [SMALLEST, CacheOptions("50%")], ids=str)
def test_token_blocks(tiny_streamed, monkeypatch, options):
    """A prompt whose partial outputs take too much memory is computed block by block."""
    bytes_per_token = 3 * 32 * 4  # top-3, hidden size 32, fp32
    monkeypatch.setattr(expertflow.experts, "_MAX_PARTIAL_BYTES", 7 * bytes_per_token)
    model = use(tiny_streamed("qwen3_moe"), EVERYTHING_CACHED)
    num_layers = model.expert_cache.num_layers
    calls_before = int(model.expert_cache.handle[1])
    expected = logits(model, token_ids(40))
    assert int(model.expert_cache.handle[1]) - calls_before == 6 * num_layers  # ceil(40 / 7)
    assert torch.equal(logits(use(model, options), token_ids(40)), expected)


def test_token_blocks_compute_what_one_block_does(tiny_streamed, monkeypatch):
    whole = logits(use(tiny_streamed("qwen3_moe"), SMALLEST), token_ids(40))
    monkeypatch.setattr(expertflow.experts, "_MAX_PARTIAL_BYTES", 1)
    single = logits(use(tiny_streamed("qwen3_moe"), SMALLEST), token_ids(40))
    torch.testing.assert_close(single, whole)


def test_empty_batch(tiny_streamed):
    experts = next(m for m in tiny_streamed("mixtral").modules() if hasattr(m, "segment_shapes"))
    use(tiny_streamed("mixtral"), SMALLEST)
    output = experts(torch.empty(0, 32), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert output.shape == (0, 32)


def test_long_prompt_does_not_wash_out_the_decode_cache(tiny_streamed):
    """It may take an eighth of the cache or the top-k, and no more."""
    model = use(tiny_streamed("mixtral"), CacheOptions("25%", "lru"))
    cache = model.expert_cache
    assert cache.num_slots == 8
    decode, prompt = torch.arange(8).view(4, 2), torch.arange(8).repeat(16).view(64, 2)

    def compute(expert_ids, layer):
        rows = ops.plan(cache.handle, expert_ids, layer).tolist()
        for row in range(8):
            ops.wait(cache.handle, row)
            ops.release(cache.handle, row)
        return [row[ops.STATE] for row in rows]

    assert compute(decode, layer=1) == [ops.MISS] * 8
    assert compute(prompt, layer=0) == [ops.MISS] * 8
    assert compute(decode, layer=1).count(ops.MISS) == cache.top_k
