"""Biased routing: exact where it must be, within its budget. Weights: test_biased_weights.py."""

import pytest
import torch
from streamed import CacheOptions, generate, logits, same_bits, token_ids, use
from tiny_models import FAMILIES
from torch.nn import functional

import expertflow
from expertflow import BiasedRouting, hit_rate
from expertflow.biased_routing import MAX_ROWS
from expertflow.routers import find_routers

HALF = CacheOptions("50%")
GREEDY = BiasedRouting(budget=1.0, strength=1.0, keep_top=1)


@pytest.fixture
def biased(tiny_streamed):
    """Gives a shared model a new cache and a routing, and routes exactly after the test."""
    changed = []

    def prepare(family, routing, options=HALF):
        model = use(tiny_streamed(family), options)
        model.set_routing(routing)
        changed.append(model)
        return model

    yield prepare
    for model in changed:
        model.set_routing("exact")


def decoded(model, new_tokens=40):
    output = generate(
        model, token_ids(20), new_tokens, output_logits=True, return_dict_in_generate=True
    )
    return [output.sequences, *output.logits]


@torch.no_grad()
def step_by_step(model, num_tokens):
    """Run the same random tokens one by one whatever the model says, and yield after each."""
    for token in token_ids(num_tokens)["input_ids"][0]:
        model(token.view(1, 1), use_cache=False)
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_no_budget_or_no_strength_changes_no_bit(biased, family):
    expected = decoded(biased(family, "exact"))
    for routing in (BiasedRouting(budget=0.0, strength=9.0), BiasedRouting(1.0, strength=0.0)):
        model = biased(family, routing)
        assert same_bits(decoded(model), expected)
        statistics = model.expert_cache.statistics()
        assert statistics["routes"] == 39 * model.expert_cache.num_layers * model.expert_cache.top_k
        assert statistics["changed_routes"] == 0
    model = biased(family, GREEDY)
    assert not same_bits(decoded(model), expected)
    assert model.expert_cache.statistics()["changed_routes"] > 0


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("budget", [0.05, 0.1, 0.3])
def test_the_budget_holds_and_is_spent_on_hits(biased, budget, scope):
    options = CacheOptions("50%", scope=scope)
    exact = biased("qwen3_moe", "exact", options)
    for _ in step_by_step(exact, 600):
        pass
    without = exact.expert_cache.statistics()
    model = biased("qwen3_moe", BiasedRouting(budget, strength=1.0), options)
    for _ in step_by_step(model, 600):
        statistics = model.expert_cache.statistics()
        assert statistics["changed_routes"] <= budget * statistics["routes"]
    assert statistics["changed_routes"] > 0.7 * budget * statistics["routes"]
    assert hit_rate(statistics) > hit_rate(without) + 0.5 * budget
    assert without["routes"] == without["changed_routes"] == 0
    for name in ("routes", "changed_routes"):
        assert statistics[name] == sum(layer[name] for layer in statistics["layers"])


def test_prompts_are_routed_exactly(biased):
    longest, long = token_ids(MAX_ROWS), token_ids(MAX_ROWS + 1)
    exact = biased("olmoe", "exact")
    expected = logits(exact, long)
    model = biased("olmoe", GREEDY)
    for _ in range(3):
        assert same_bits([logits(model, long)], [expected])
    assert model.expert_cache.statistics()["routes"] == 0
    logits(model, longest)
    assert model.expert_cache.statistics()["changed_routes"] > 0


def test_reset_starts_the_counts_and_the_budget_anew(biased):
    model = biased("olmoe", BiasedRouting(budget=0.05, strength=1.0))
    generate(model, token_ids(20), 30)
    model.expert_cache.reset_statistics()
    assert model.expert_cache.statistics()["routes"] == 0
    generate(model, token_ids(20), 30)
    statistics = model.expert_cache.statistics()
    assert 0 < statistics["changed_routes"] <= 0.05 * statistics["routes"]
    use(model, CacheOptions("25%"))
    assert model.expert_cache.statistics()["routes"] == 0
    generate(model, token_ids(20), 30)
    assert model.expert_cache.statistics()["changed_routes"] > 0


def test_routers_of_which_only_the_sizes_are_read_are_not_copied(biased):
    model = biased("qwen3_moe", "exact")
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    weights = find_routers(model).weights
    assert all(w is gate.weight for w, gate in zip(weights, gates, strict=True))


def test_the_predictor_learns_what_the_routers_wanted(biased, monkeypatch):
    """What it has learned follows from what the routers were given, not from what was changed."""
    model = biased("qwen3_moe", GREEDY)
    routers = find_routers(model)
    predictor = expertflow.ExpertPredictor(routers, max_distance=2, num_token_buckets=0)
    alone = expertflow.ExpertPredictor(routers, max_distance=2, num_token_buckets=0)
    given, horizons, embedded = [], [], []
    foresee, foresee_token = predictor.foresee, predictor.foresee_token

    def note_horizon(layer, states, horizon):
        horizons.append((layer, horizon))
        return foresee(layer, states, horizon)

    def note_embeddings(embeddings, horizon):
        embedded.append((embeddings, horizon))
        return foresee_token(embeddings, horizon)

    monkeypatch.setattr(predictor, "foresee", note_horizon)
    monkeypatch.setattr(predictor, "foresee_token", note_embeddings)
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [
        gate.register_forward_pre_hook(lambda _, seen: given.append(seen[0])) for gate in gates
    ]
    model.set_predictor(predictor)
    generate(model, token_ids(20), 30)
    model.set_predictor(None)
    for hook in hooks:
        hook.remove()
    assert model.expert_cache.statistics()["changed_routes"] > 0
    for (layer, horizon), states in zip(horizons, given, strict=True):
        if layer == 0:
            alone.foresee_token(*embedded.pop(0))
        alone.foresee(layer, states.view(-1, states.shape[-1]), horizon)
        alone.learn(layer)
    assert predictor._core.state["weights"].any()
    for name, learned in predictor._core.state.items():
        assert (learned == alone._core.state[name]).all()


def test_a_compiled_model_is_biased_too(biased):
    model = biased("qwen3_moe", GREEDY)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            compiled(**token_ids(4))
    assert model.expert_cache.statistics()["changed_routes"] > 0


def test_a_model_compiled_before_is_biased_too(biased):
    model = biased("qwen3_moe", GREEDY)
    model.set_routing("exact")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**token_ids(4))
        model.set_routing(GREEDY)
        for _ in range(3):
            compiled(**token_ids(4))
    assert model.expert_cache.statistics()["changed_routes"] > 0


def test_exact_takes_the_hooks_away(biased):
    model = biased("qwen3_moe", GREEDY)
    model.set_routing(BiasedRouting())
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    assert [len(router._forward_hooks) for router in routers] == [1, 1, 1]
    model.set_routing("exact")
    assert not any(router._forward_hooks for router in routers)
    assert model.expert_cache.biased_router is None


def test_residents_are_in_a_slot_or_on_their_way(tiny_streamed):
    cache = use(tiny_streamed("olmoe"), CacheOptions("25%")).expert_cache
    assert cache.residents(1).tolist() == [0] * 8
    cache.prefetch(1, torch.tensor([3, 6]))
    assert cache.residents(1).tolist() == [0, 0, 0, 1, 0, 0, 1, 0]
    assert cache.residents(2).sum() == 0
    with pytest.raises(IndexError, match="MoE layer 3"):
        cache.residents(3)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"budget": 1.5}, "budget=1.5"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"strength": float("inf")}, "strength=inf"),
        ({"keep_top": -1}, "keep_top=-1"),
        ({"keep_top": 0.5}, "keep_top=0.5"),
    ],
)
def test_values_out_of_range(arguments, culprit):
    with pytest.raises(ValueError, match=culprit):
        BiasedRouting(**arguments)


def test_other_routings_are_refused(tiny_checkpoint, biased):
    with pytest.raises(ValueError, match="routing='biased'"):
        expertflow.from_pretrained(tiny_checkpoint("olmoe"), routing="biased", progress=False)
    model = biased("olmoe", GREEDY)
    with pytest.raises(ValueError, match="routing=None"):
        model.set_routing(None)
    assert model.expert_cache.biased_router.routing is GREEDY


def test_moe_layer_of_ones_own():
    generator = torch.Generator().manual_seed(1)
    routers = torch.randn(2, 8, 16, generator=generator)
    tensors = {
        "gate_up_proj": torch.randn(2, 8, 24, 16, generator=generator),
        "down_proj": torch.randn(2, 8, 16, 12, generator=generator),
    }
    cache = expertflow.ExpertCache.from_tensors(tensors, 2, num_slots=8)
    cache.biased_router = expertflow.BiasedRouter(
        expertflow.Routers(routers.numpy(), 2), BiasedRouting(budget=0.2, strength=1.0)
    )
    layers = [expertflow.MoELayer(router, cache, i) for i, router in enumerate(routers)]
    num_changed = 0
    for _ in range(100):
        token = torch.randn(1, 16, generator=generator)
        for layer in layers:
            logits = functional.linear(token, layer.router)
            before = cache.statistics()["changed_routes"]
            weights, ids = layer.route(token)
            changed = cache.statistics()["changed_routes"] - before
            wanted = logits.topk(2).indices
            assert int((ids != wanted).sum()) == changed
            num_changed += changed
            expected = logits.softmax(-1).gather(-1, ids)
            torch.testing.assert_close(weights, expected / expected.sum())
            layer(token)
    assert num_changed > 20
