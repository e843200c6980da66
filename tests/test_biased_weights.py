"""Biased routing weighs what it changes by the rule of each family."""

import pytest
import torch
from streamed import generate, token_ids
from tiny_models import FAMILIES, make_model

import expertflow
from expertflow import BiasedRouting
from expertflow.experts import StreamedExperts

GREEDY = BiasedRouting(budget=1.0, strength=1.0, keep_top=1)


def watch(model):
    """Lists that fill with what routers returned by themselves, and what experts were called with.

    One (layer, router, logits, weights, ids) and one (layer, ids, weights) a pass and layer.
    """
    wanted, done = [], []
    for name, experts in model.named_modules():
        if not isinstance(experts, StreamedExperts):
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        router = getattr(block, "gate", None) or block.router
        forward = router.forward

        def note_wanted(hidden, layer=experts.layer_index, router=router, forward=forward):
            output = forward(hidden)
            wanted.append((layer, router, *output))
            return output

        router.forward = note_wanted
        experts.register_forward_pre_hook(
            lambda module, arguments: done.append((module.layer_index, arguments[1], arguments[2]))
        )
    return wanted, done


def expected_weights(family, config, logits, ids):
    """The weights of `ids` [k] by the family's formula, from the logits [experts], in fp64."""
    logits = logits.double()
    if family == "gpt_oss":
        return logits[ids].softmax(0)
    if family in ("deepseek_v3", "glm4_moe"):
        weights = logits.sigmoid()[ids]
    else:
        weights = logits.softmax(0)[ids]
    if family == "mixtral" or (family != "deepseek_v2" and config.norm_topk_prob):
        weights = weights / weights.sum()
    return weights * getattr(config, "routed_scaling_factor", 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_changed_ids_are_weighed_by_the_rule_of_the_family(tiny_checkpoint, family, dtype):
    model = expertflow.from_pretrained(
        tiny_checkpoint(family), expert_cache="50%", dtype=dtype, routing=GREEDY, progress=False
    )
    wanted, done = watch(model)
    generate(model, token_ids(20), 40)
    num_changed = 0
    for (layer, router, scores, weights, ids), (same_layer, new_ids, new_weights) in zip(
        wanted, done, strict=True
    ):
        assert layer == same_layer
        assert new_weights.dtype == weights.dtype
        for token in range(len(ids)):
            if torch.equal(ids[token], new_ids[token]):
                assert torch.equal(weights[token], new_weights[token])
                continue
            is_changed = ids[token] != new_ids[token]
            num_changed += int(is_changed.sum())
            selection = scores[token].float()
            if family in ("deepseek_v3", "glm4_moe"):
                selection = selection.sigmoid() + router.e_score_correction_bias
            best = selection[ids[token]].argmax()
            assert not is_changed[best]
            assert len(new_ids[token].unique()) == len(new_ids[token])
            groups = getattr(model.config, "n_group", None) or 1
            size = scores.shape[1] // groups
            assert len((new_ids[token] // size).unique()) <= (
                getattr(model.config, "topk_group", None) or 1
            )
            expected = expected_weights(family, model.config, scores[token], new_ids[token])
            torch.testing.assert_close(
                new_weights[token].double(),
                expected,
                rtol=1e-5 if weights.dtype == torch.float32 else 0.01,
                atol=1e-6,
            )
    assert num_changed == model.expert_cache.statistics()["changed_routes"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(tiny_checkpoint, family):
    model = expertflow.from_pretrained(
        tiny_checkpoint(family), expert_cache="50%", device="cuda", progress=False
    )
    prompt = {name: tensor.cuda() for name, tensor in token_ids(20, 20).items()}
    expected = generate(model, prompt, 40)
    model.set_routing(BiasedRouting(budget=0.0))
    assert torch.equal(generate(model, prompt, 40), expected)
    model.set_routing(GREEDY)
    wanted, done = watch(model)
    generate(model, prompt, 40)
    num_changed = 0
    for (_, _, scores, weights, ids), (_, new_ids, new_weights) in zip(wanted, done, strict=True):
        assert new_ids.device == ids.device and new_weights.dtype == weights.dtype
        num_changed += int((ids != new_ids).sum())
        for token in range(len(ids)):
            expected = expected_weights(family, model.config, scores[token], new_ids[token])
            torch.testing.assert_close(new_weights[token].double(), expected, rtol=1e-5, atol=1e-6)
    assert num_changed == model.expert_cache.statistics()["changed_routes"] > 0


def test_routers_that_weigh_otherwise_are_refused(tiny_streamed, monkeypatch):
    model = tiny_streamed("qwen3_moe")
    router = model.model.layers[0].mlp.gate
    forward = type(router).forward

    def squared(self, hidden):
        logits, weights, ids = forward(self, hidden)
        return logits, weights**2, ids

    monkeypatch.setattr(type(router), "forward", squared)
    with pytest.raises(expertflow.UnsupportedModelError, match=r'qwen3_moe.*routing="exact"'):
        model.set_routing(GREEDY)
    assert model.expert_cache.biased_router is None
    monkeypatch.undo()
    monkeypatch.setattr(model.config, "model_type", "new_moe")
    with pytest.raises(expertflow.UnsupportedModelError, match="new_moe"):
        model.set_routing(GREEDY)


def test_plain_models_have_the_routers_that_are_biased():
    """Every family of ours returns (logits, weights, ids) from the module beside the experts."""
    for family in FAMILIES:
        model = make_model(family)
        router = next(
            module
            for name, module in model.named_modules()
            if name.endswith(("gate", "router")) and hasattr(module, "top_k")
        )
        output = router(torch.randn(3, model.config.hidden_size))
        assert [len(part) for part in output] == [3, 3, 3]
