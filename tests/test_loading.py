"""`from_pretrained`: what it loads, and that a failure leaves nothing behind."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from loaded import check_same, load, logits
from transformers import AutoModelForCausalLM, PreTrainedModel

import expertflow
from expertflow import from_pretrained, loading, model_info, streamed_model
from expertflow.experts import StreamedExperts


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_logits_are_those_of_transformers(tmp_path, family, fused):
    if not fused and family in tiny_models.ALWAYS_FUSED:
        pytest.skip("has no per-expert layout")
    tiny_models.make_checkpoint(family, tmp_path, fused=fused)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    for cache in ("25%", model_info(tmp_path).smallest_cache_bytes):
        for pool in ("ram", "file"):
            check_same(load(tmp_path, expert_cache=cache, pool=pool), reference)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_experts_matter(family):
    """Otherwise the comparisons with transformers would say nothing about experts."""
    model = tiny_models.make_model(family)
    before = logits(model)
    for name, module in model.named_modules():
        if name.endswith(".mlp.experts"):
            for parameter in module.parameters():
                parameter.data.copy_(parameter.data.flip(0))
    assert (logits(model) - before).abs().max() > 0.1 * before.abs().max()


def test_shards_are_loaded(sharded_path):
    assert len(list(sharded_path.glob("*.safetensors"))) > 3
    reference = AutoModelForCausalLM.from_pretrained(sharded_path)
    for pool in ("ram", "file"):
        check_same(load(sharded_path, pool=pool), reference)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float32"])
def test_experts_are_converted_while_they_are_read(qwen_path, dtype):
    model = load(qwen_path, dtype=dtype, expert_cache="100%")
    reference = AutoModelForCausalLM.from_pretrained(qwen_path, dtype=dtype)
    assert model.dtype == reference.dtype
    stored = reference.model.layers[2].mlp.experts
    experts = model.model.layers[2].mlp.experts
    slots = [model.expert_cache.slots.weights(8 + expert) for expert in range(experts.num_experts)]
    for name in experts.segment_shapes:
        assert torch.equal(torch.stack([slot[name] for slot in slots]), getattr(stored, name))
    check_same(model.float() if dtype == "float32" else model, reference, 5e-2)


def test_dtype_auto_is_that_of_the_checkpoint(tmp_path):
    tiny_models.make_checkpoint("olmoe", tmp_path, torch.bfloat16)
    assert load(tmp_path).dtype == torch.bfloat16
    tiny_models.edit_config(tmp_path, dtype=None)
    assert load(tmp_path).dtype == torch.bfloat16
    assert load(tmp_path, dtype=None).dtype == torch.bfloat16
    assert load(tmp_path, torch_dtype=None).dtype == torch.bfloat16
    assert load(tmp_path, torch_dtype="float32").dtype == torch.float32


def test_nothing_of_the_experts_is_a_parameter(qwen_path):
    model = load(qwen_path)
    assert not any("experts" in name for name, _ in model.named_parameters())
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == (
        model_info(qwen_path).other_bytes
    )
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [m.layer_index for m in model.modules() if isinstance(m, StreamedExperts)] == [0, 1, 2]


def test_loading_says_nothing_about_experts(qwen_path, caplog):
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        _, info = load(qwen_path, output_loading_info=True)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_left_over_tensors_outside_the_experts_are_reported(own_path, caplog):
    tiny_models.rewrite_tensors(own_path, lambda t: t.update({"model.extra": torch.ones(1)}))
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        _, info = load(own_path, output_loading_info=True)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert info["unexpected_keys"] == {"model.extra"}
    assert "model.extra" in caplog.text and "experts" not in caplog.text


def test_config_attributes_can_be_overridden(qwen_path):
    model = load(qwen_path, num_experts_per_tok=2, attn_implementation="eager")
    assert model.expert_cache.top_k == 2
    assert model.config._attn_implementation == "eager"
    reference = AutoModelForCausalLM.from_pretrained(qwen_path, num_experts_per_tok=2)
    check_same(model, reference)


def test_config_object_can_be_passed(qwen_path):
    config = transformers.AutoConfig.from_pretrained(qwen_path)
    config.num_experts_per_tok = 1
    assert load(qwen_path, config=config).expert_cache.top_k == 1


def test_progress_bar_counts_bytes(qwen_path, capsys):
    from_pretrained(qwen_path)
    assert "Loading experts: 100%" in capsys.readouterr().err
    load(qwen_path)
    assert capsys.readouterr().err == ""


def test_package_exports_what_users_need():
    assert expertflow.from_pretrained is from_pretrained


# Failures leave nothing behind


def check_plain_model_is_plain(path):
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert not isinstance(plain.model.layers[0].mlp.experts, StreamedExperts)
    assert any("experts" in name for name, _ in plain.named_parameters())


def test_transformers_is_left_as_it_was(qwen_path, monkeypatch):
    load(qwen_path)
    check_plain_model_is_plain(qwen_path)

    class NoExperts(StreamedExperts):
        def __init__(self, config):
            raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(streamed_model, "streamed_class", lambda original: NoExperts)
        with pytest.raises(RuntimeError, match="out of luck"):
            load(qwen_path)
    check_plain_model_is_plain(qwen_path)


def test_several_threads_may_load_at_once(qwen_path):
    tie_weights = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as threads:
        models = list(threads.map(lambda _: load(qwen_path), range(8)))
    check_plain_model_is_plain(qwen_path)
    assert PreTrainedModel.tie_weights is tie_weights, "transformers is left patched"
    expected = logits(models[0])
    assert all(torch.equal(logits(model), expected) for model in models)


def test_interrupt_while_filling_the_pool_cancels_it(qwen_path, monkeypatch):
    fills = []

    class InterruptedPool(loading.RamPool):
        def start_fill(self, source, num_threads):
            fills.append(InterruptedFill(super().start_fill(source, num_threads)))
            return fills[0]

    class InterruptedFill:
        def __init__(self, fill):
            self.fill, self.cancelled, self.waits = fill, False, 0

        bytes_total = property(lambda self: self.fill.bytes_total)
        bytes_done = property(lambda self: self.fill.bytes_done)

        def wait(self, timeout_seconds):
            self.waits += 1
            if self.waits == 1:
                raise KeyboardInterrupt
            return self.fill.wait(timeout_seconds)

        def cancel(self):
            self.cancelled = True
            self.fill.cancel()

    monkeypatch.setattr(loading, "RamPool", InterruptedPool)
    with pytest.raises(KeyboardInterrupt):
        load(qwen_path)
    assert fills[0].cancelled and fills[0].waits > 1


def test_file_that_is_cut_while_filling_the_pool_is_named(own_path, monkeypatch):
    original = loading.CheckpointSource

    def open_then_cut(files, *arguments):
        source = original(files, *arguments)
        with Path(files[0]).open("r+b") as file:
            file.truncate(2000)
        return source

    monkeypatch.setattr(loading, "CheckpointSource", open_then_cut)
    with pytest.raises((OSError, RuntimeError), match=str(own_path / "model.safetensors")):
        load(own_path)
