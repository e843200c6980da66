"""The minimal MoE layer: a plain reference, the predictor hook, and no need of transformers."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from random_experts import RandomExperts
from streamed import DTYPES, POOLS
from torch.nn import functional

from expertflow import ExpertCache, ExpertPredictor, MoELayer, Routers
from expertflow.experts import compute_experts

NUM_LAYERS, NUM_EXPERTS, HIDDEN, TOP_K = 3, 8, 16, 2
TOKENS = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1))
ROUTERS = torch.randn(NUM_LAYERS, NUM_EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return RandomExperts(tmp_path_factory.mktemp("layer") / "experts.bin")


def model(cache, dtype=torch.float32, **kwargs):
    routers = ROUTERS.to(dtype)
    return [MoELayer(router, cache, layer, **kwargs) for layer, router in enumerate(routers)]


def run(layers, hidden):
    for layer in layers:
        hidden = hidden + layer(hidden)
    return hidden


def reference(experts, layer, tokens, normalize=True):
    """Token by token and expert by expert, in fp64."""
    tokens = tokens.double()
    probabilities = (tokens @ ROUTERS[layer].double().t()).softmax(-1)
    out = torch.zeros_like(tokens)
    for token, row in enumerate(probabilities):
        chosen = row.argsort(descending=True)[:TOP_K].tolist()
        total = sum(row[expert] for expert in chosen) if normalize else 1
        for expert in chosen:
            out[token] += row[expert] / total * experts.mlp(layer, expert, tokens[token])
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_equals_a_plain_layer(experts, pool, num_tokens, normalize):
    cache = experts.cache(TOP_K, pool=pool)
    layer = MoELayer(ROUTERS[1], cache, 1, normalize=normalize)
    expected = reference(experts, 1, TOKENS[:num_tokens], normalize)
    output = layer(TOKENS[:num_tokens])
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    assert output.dtype == torch.float32
    assert cache.statistics()["layers"][1]["misses"] > 0


def test_bfloat16(tmp_path):
    experts = RandomExperts(tmp_path / "experts.bin", torch.bfloat16)
    tokens = TOKENS.bfloat16()
    layer = MoELayer(ROUTERS[0].bfloat16(), experts.cache(TOP_K), 0)
    output = layer(tokens)
    assert output.dtype == torch.bfloat16
    weights, ids = layer.route(tokens)  # also in bf16: which experts are chosen depends on it
    expected = torch.stack(
        [
            sum(weight * experts.mlp(0, expert, token) for expert, weight in zip(e, w, strict=True))
            for e, w, token in zip(ids.tolist(), weights.double(), tokens, strict=True)
        ]
    )
    error = (output.double() - expected).abs().max() / expected.abs().max()
    assert error < 2**-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_with_every_cache(tmp_path, dtype):
    experts = RandomExperts(tmp_path / "experts.bin", dtype)
    tokens = TOKENS.to(dtype)
    expected = run(model(experts.cache(24, pool="ram"), dtype), tokens)
    for num_slots in (2, 3, 9, 23):
        assert torch.equal(run(model(experts.cache(num_slots), dtype), tokens), expected)


def test_any_leading_shape(experts):
    layer = MoELayer(ROUTERS[0], experts.cache(6), 0)
    flat = layer(TOKENS)
    assert torch.equal(layer(TOKENS.view(2, 20, HIDDEN)), flat.view(2, 20, HIDDEN))
    assert layer(TOKENS[:0].view(0, 5, HIDDEN)).shape == (0, 5, HIDDEN)


def test_activation(experts):
    cache = experts.cache(6)
    relu = MoELayer(ROUTERS[0], cache, 0, activation=functional.relu)
    assert not torch.allclose(relu(TOKENS), MoELayer(ROUTERS[0], cache, 0)(TOKENS))


def test_predictor(experts):
    """It is asked in every layer but for layers that exist; what it names is there in time."""
    calls = []

    def foresee(layer, hidden):
        calls.append((layer, hidden))
        next_ids = layers[layer + 1].route(hidden)[1] if layer + 1 < NUM_LAYERS else None
        nearest = [] if next_ids is None else [(1, next_ids.view(-1).unique())]
        return [*nearest, (NUM_LAYERS, torch.tensor([0]))]  # no such layer: ignored

    cache = experts.cache(18)
    layers = model(cache, predictor=foresee)
    token = TOKENS[:1]
    for layer in layers:  # all see the same token, so the prediction is right
        expected = reference(experts, layer.layer, token)
        torch.testing.assert_close(layer(token).double(), expected, rtol=1e-5, atol=1e-6)
    assert [layer for layer, _ in calls] == [0, 1, 2]
    assert all(torch.equal(hidden, token) for _, hidden in calls)
    first, *later = cache.statistics()["layers"]
    assert first["misses"] == TOP_K
    for counts in later:
        assert counts["misses"] == 0
        assert counts["hits"] + counts["late_hits"] == TOP_K
    total = cache.statistics()
    fetched = total["prefetch_bytes"] + total["demand_bytes"]
    assert fetched == NUM_LAYERS * TOP_K * cache.slot_bytes
    assert total["wasted_prefetch_bytes"] == 0


def test_prefetches_that_are_done_count_as_prefetch_bytes(experts):
    cache = experts.cache(18)
    layer = MoELayer(
        ROUTERS[0], cache, 0, predictor=lambda layer, hidden: [(2, torch.tensor([3, 6, 7]))]
    )
    layer(TOKENS[:1])
    deadline = time.monotonic() + 60
    while cache.statistics()["prefetch_bytes"] < 3 * cache.slot_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    target = MoELayer(ROUTERS[2], cache, 2)
    target.route = lambda hidden: (torch.tensor([[0.5, 0.5]]), torch.tensor([[6, 3]]))
    target(TOKENS[:1])
    counts = cache.statistics()["layers"][2]
    assert (counts["hits"], counts["misses"], counts["late_hits"]) == (2, 0, 0)
    assert counts["prefetch_bytes"] == 3 * cache.slot_bytes
    assert counts["demand_bytes"] == 0


def test_online_predictor_learns_what_to_fetch(experts):
    """Four tokens in turn, and every layer turns its input: the pre-gate knows nothing of it."""
    predictor = ExpertPredictor(Routers(ROUTERS.numpy(), TOP_K))
    cache = experts.cache(12)
    cache.set_horizon(2)
    layers, plain = model(cache, predictor=predictor), model(experts.cache(24))
    foreseen = {}
    for step in range(400):
        for layer, reference_layer in zip(layers, plain, strict=True):
            token = TOKENS[step % 4].roll(5 * layer.layer).view(1, HIDDEN)
            assert torch.equal(layer(token), reference_layer(token))
            if layer.layer > 0 and step >= 396:
                routed = set(layer.route(token)[1].flatten().tolist())
                need = foreseen[layer.layer - 1]
                assert routed == set(need.argsort()[-TOP_K:].tolist())
            if layer.layer < NUM_LAYERS - 1:
                foreseen[layer.layer] = predictor.need(1)
    assert cache.statistics()["prefetch_bytes"] > 0


class Foresight:
    """Knows the next layer's experts, and notes what happens in which order."""

    def __init__(self, cache, layers):
        self.cache, self.layers, self.events = cache, layers, []

    def begin_layer(self, layer, hidden):
        self.events.append(("begin", layer, None))

    def foresee(self, layer, hidden, max_distance):
        self.events.append(("foresee", layer, max_distance))
        assert self.cache.statistics()["misses"] > 0, "the layer was planned before"
        need = np.zeros((min(max_distance, 1), NUM_EXPERTS), np.float32)
        if layer + 1 < NUM_LAYERS:
            need[:, self.layers[layer + 1].route(hidden)[1].flatten()] = 0.99
        return need

    def learn(self, layer):
        self.events.append(("learn", layer, self.cache.statistics()["prefetch_bytes"]))


def test_predictor_of_needs_is_asked_as_far_as_the_horizon(experts):
    cache = experts.cache(18)
    cache.set_horizon(1)
    layers = model(cache)
    foresight = Foresight(cache, layers)
    for layer in layers:
        layer.predictor = foresight
        layer(TOKENS[:1])
    events = [(name, layer) for name, layer, _ in foresight.events]
    calls = ("begin", "foresee", "learn")
    assert events == [(name, layer) for layer in range(NUM_LAYERS) for name in calls]
    assert {asked for name, _, asked in foresight.events if name == "foresee"} == {1}
    total = cache.statistics()
    assert total["misses"] == TOP_K  # of the first layer
    assert total["prefetches_used"] == (NUM_LAYERS - 1) * TOP_K
    assert total["horizon"] == 1


def test_useless_predictor_changes_nothing(experts):
    generator = torch.Generator().manual_seed(3)

    def guess(layer, hidden):
        for distance in (1, 2):
            yield distance, torch.randint(NUM_EXPERTS, (5,), generator=generator)

    expected = run(model(experts.cache(24)), TOKENS[:4])
    for num_slots in (2, 5, 12):
        cache = experts.cache(num_slots, policy="two_level_lru")
        for _ in range(5):
            assert torch.equal(run(model(cache, predictor=guess), TOKENS[:4]), expected)


def test_prediction_out_of_range_is_an_error(experts):
    layer = MoELayer(
        ROUTERS[0], experts.cache(6), 0, predictor=lambda *_: [(1, torch.tensor([NUM_EXPERTS]))]
    )
    with pytest.raises(IndexError, match="expert 8 of MoE layer 1"):
        layer(TOKENS)
    layer.predictor = None
    assert torch.equal(layer(TOKENS), MoELayer(ROUTERS[0], experts.cache(6), 0)(TOKENS))


def test_wrong_number_of_experts(experts):
    with pytest.raises(ValueError, match="layer 2 scores 7 experts, the cache has 8"):
        MoELayer(ROUTERS[2][:7], experts.cache(6), 2)


def test_layer_that_does_not_exist(experts):
    with pytest.raises(ValueError, match="layer 3 is not one of the cache's 3 layers"):
        MoELayer(ROUTERS[0], experts.cache(6), 3)


def test_works_without_transformers():
    script = """
import sys
sys.modules["transformers"] = None  # importing it fails
from expertflow import ExpertCache, ExpertPredictor, MoELayer, Routers
from expertflow.experts import compute_experts
print(MoELayer.__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "MoELayer\n", done.stderr


def test_router_may_be_float32_in_a_bfloat16_model():
    weights = {
        "gate_up_proj": torch.randn(1, NUM_EXPERTS, 24, HIDDEN, dtype=torch.bfloat16),
        "down_proj": torch.randn(1, NUM_EXPERTS, HIDDEN, 12, dtype=torch.bfloat16),
    }
    layer = MoELayer(ROUTERS[0], ExpertCache.from_tensors(weights, TOP_K, num_slots=TOP_K), 0)
    routed, expert_ids = layer.route(TOKENS.bfloat16())
    assert routed.dtype == torch.float32
    scores = TOKENS.bfloat16().float() @ ROUTERS[0].t()
    assert torch.equal(expert_ids, scores.topk(TOP_K).indices)
    assert layer(TOKENS.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_expert_that_is_routed_to_twice(num_tokens):
    """A router of somebody else's may do so; each of the two weights counts."""
    weights = torch.randn(1, NUM_EXPERTS, HIDDEN, HIDDEN)
    cache = ExpertCache.from_tensors({"matrix": weights}, TOP_K, num_slots=TOP_K)
    tokens = TOKENS[:num_tokens]
    output = compute_experts(
        cache,
        0,
        tokens,
        torch.full((num_tokens, 2), 3),
        torch.tensor([[0.25, 0.5]]).expand(num_tokens, 2),
        lambda x, expert: x @ expert["matrix"],
    )
    torch.testing.assert_close(output, 0.75 * tokens @ weights[0, 3])


def test_from_tensors_takes_tensors_that_are_not_contiguous():
    weights = torch.randn(HIDDEN, HIDDEN, 2, NUM_EXPERTS).permute(3, 2, 0, 1).transpose(0, 1)
    cache = ExpertCache.from_tensors({"matrix": weights}, TOP_K, num_slots=TOP_K)
    for layer in range(2):
        output = compute_experts(
            cache,
            layer,
            TOKENS[:1],
            torch.tensor([[5]]),
            torch.ones(1, 1),
            lambda x, expert: x @ expert["matrix"],
        )
        torch.testing.assert_close(output, TOKENS[:1] @ weights[layer, 5])
