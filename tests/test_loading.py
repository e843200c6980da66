"""`from_pretrained`: what it loads, how little it holds, and what it refuses before reading."""

import gc
import json
import logging
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import expertflow
from expertflow import (
    CheckpointError,
    UnsupportedModelError,
    from_pretrained,
    loading,
    model_info,
    streamed_model,
)
from expertflow.experts import StreamedExperts

PROMPT = torch.randint(
    2, tiny_models.VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1)
)


def load(path, **arguments):
    return from_pretrained(path, progress=False, **arguments)


@torch.no_grad()
def logits(model):
    return model(PROMPT).logits


def check_same(model, reference, tolerance=1e-5):
    expected = logits(reference)
    error = (logits(model) - expected).abs().max() / expected.abs().max()
    assert error <= tolerance


def check_refused(path, *words, error=UnsupportedModelError, **arguments):
    """Loading must fail, and the message must hold all of `words`."""
    with pytest.raises(error) as caught:
        load(path, **arguments)
    for word in words:
        assert str(word) in str(caught.value)


@pytest.fixture(scope="module")
def qwen_path(tmp_path_factory):
    """A Qwen3-MoE checkpoint that no test changes."""
    return tiny_models.make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="module")
def sharded_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded")
    return tiny_models.make_checkpoint("qwen3_moe", path, max_shard_size="60KB")


@pytest.fixture
def own_path(qwen_path, tmp_path):
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(qwen_path, tmp_path / "model"))


# What is loaded


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
    slots = [model.expert_cache.slot_weights(8 + expert) for expert in range(experts.num_experts)]
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


# The size of the cache and of the memory


def test_percentages_become_slots(qwen_path):
    slots = {
        size: load(qwen_path, expert_cache=size).expert_cache.num_slots for size in ("25%", 0.5)
    }
    assert slots == {"25%": 6, 0.5: 12}


def test_cache_larger_than_all_experts_is_all_of_them(qwen_path):
    assert load(qwen_path, expert_cache="1GiB").expert_cache.num_slots == 24


def test_every_layer_gets_as_many_slots(qwen_path):
    model = load(qwen_path, expert_cache=0.45, cache_scope="layer")
    assert model.expert_cache.num_slots == 9


@pytest.mark.parametrize(("scope", "smallest"), [("global", 3), ("layer", 9)])
def test_cache_smaller_than_one_layers_top_k_is_refused(qwen_path, scope, smallest):
    slot_bytes = model_info(qwen_path).expert_bytes
    load(qwen_path, expert_cache=smallest * slot_bytes, cache_scope=scope)
    words = (f"expert_cache={smallest * slot_bytes - 1}", f"{smallest * slot_bytes} bytes")
    size = smallest * slot_bytes - 1
    check_refused(qwen_path, *words, expert_cache=size, cache_scope=scope, error=ValueError)


@pytest.mark.parametrize("size", ["lots", "-1GiB", "150%", None, 1.5])
def test_size_that_does_not_parse_is_named(qwen_path, size):
    check_refused(qwen_path, f"expert_cache={size!r}", expert_cache=size, error=ValueError)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"policy": "fifo"}, "fifo"),
        ({"cache_scope": "model"}, "model"),
        ({"pool": "tape"}, "tape"),
        ({"dtype": "float64"}, "float64"),
        ({"dtype": "floaty"}, "floaty"),
        ({"dtype": torch.int8}, "int8"),
        ({"num_threads": 0}, "num_threads=0"),
        ({"ram_limit": "much"}, "ram_limit='much'"),
    ],
)
def test_meaningless_option_is_named_before_reading(qwen_path, monkeypatch, arguments, word):
    monkeypatch.setattr(loading, "_load_without_experts", forbidden)
    check_refused(qwen_path, word, error=ValueError, **arguments)


def forbidden(*_):
    raise AssertionError("nothing may be read")


def test_too_little_memory_is_refused_before_reading(qwen_path, monkeypatch):
    monkeypatch.setattr(loading, "_load_without_experts", forbidden)
    info = model_info(qwen_path)
    needed = info.expert_bytes_total * 5 // 4 + info.other_bytes
    check_refused(qwen_path, "needs", 'pool="file"', ram_limit=needed - 30_000, error=MemoryError)
    check_refused(qwen_path, "No cache would fit", ram_limit=1000, error=MemoryError)


def test_file_pool_needs_less_memory(qwen_path):
    info = model_info(qwen_path)
    limit = info.other_bytes + 6 * info.expert_bytes
    model = load(qwen_path, pool="file", ram_limit=limit)
    assert model.expert_cache.num_slots == 6
    check_refused(qwen_path, 'pool="file" with expert_cache', ram_limit=limit, error=MemoryError)


def test_cache_of_all_experts_is_the_ram_pool_itself(qwen_path):
    info = model_info(qwen_path)
    pool_bytes = 24 * -(-info.expert_bytes // 4096) * 4096
    load(qwen_path, expert_cache="100%", ram_limit=pool_bytes + info.other_bytes)
    limit = pool_bytes + info.other_bytes
    check_refused(qwen_path, 'expert_cache="100%"', ram_limit=limit, error=MemoryError)


def test_what_model_info_says_would_fit_does(qwen_path):
    info = model_info(qwen_path)
    pool_bytes = 24 * -(-info.expert_bytes // 4096) * 4096
    for pool, num_slots in (("file", 5), ("ram", 0), ("ram", 7)):
        limit = info.other_bytes + (num_slots + 1) * info.expert_bytes - 1
        limit += pool_bytes if pool == "ram" else 0
        info = model_info(qwen_path, ram_limit=limit)
        largest = {"ram": info.largest_ram_pool_cache_bytes, "file": info.largest_cache_bytes}[pool]
        assert largest == num_slots * info.expert_bytes
        arguments = {"pool": pool, "ram_limit": limit}
        if largest:
            assert load(qwen_path, expert_cache=largest, **arguments)
            words = [f'pool="{pool}" with expert_cache up to {largest} ']
        else:
            words = ['expert_cache="100%"', 'pool="file"']
        larger = max(largest, info.smallest_cache_bytes) + info.expert_bytes
        check_refused(qwen_path, *words, expert_cache=larger, **arguments, error=MemoryError)
        if pool == "ram":
            assert info.fits_ram_pool
            assert load(qwen_path, expert_cache="100%", **arguments)


def test_memory_is_freed_with_the_model(qwen_path):
    model = load(qwen_path)
    cache = weakref.ref(model.expert_cache)
    gc.disable()
    try:
        del model
        assert cache() is None
    finally:
        gc.enable()


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"quantization_config": {"load_in_4bit": True}}, ["quantization_config", "quantiz"]),
        ({"load_in_8bit": True}, ["load_in_8bit"]),
        ({"gguf_file": "model.gguf"}, ["GGUF"]),
        ({"state_dict": {"a": torch.ones(1)}}, ["state_dict"]),
        ({"tp_plan": "auto"}, ["tp_plan", "tensor parallel"]),
        ({"tp_size": 2}, ["tp_size"]),
        ({"device_map": "auto"}, ["device_map='auto'"]),
        ({"device_map": {"": "cuda:99"}}, ["device_map='cuda:99'"]),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, ["device_map", "offload"]),
        ({"device_map": 99}, ["device_map=99"]),
        ({"device": "cuda:99"}, ["device='cuda:99'"]),
        ({"device": torch.device("cuda", 99)}, ["device=device(type='cuda', index=99)"]),
        ({"device": "mps"}, ["device='mps'"]),
        ({"device": "cpu:1"}, ["device='cpu:1'"]),
        ({"offload_folder": "/tmp/x"}, ["offload_folder", 'pool="file"']),
        ({"max_memory": {"cpu": "1GiB"}}, ["max_memory"]),
        ({"experts_implementation": "grouped_mm"}, ["experts_implementation"]),
        ({"use_kernels": True}, ["use_kernels"]),
        ({"key_mapping": {"a": "b"}}, ["key_mapping"]),
        ({"trust_remote_code": True}, ["trust_remote_code"]),
        ({"use_safetensors": False}, ["use_safetensors"]),
    ],
)
def test_argument_that_cannot_be_honoured_is_named(qwen_path, arguments, words):
    check_refused(qwen_path, *words, **arguments)


ONE_CPU = ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)]


@pytest.mark.parametrize("device_map", [None, *ONE_CPU, {"": "cpu"}, {"": "cpu:0"}])
def test_device_map_of_one_cpu_is_allowed(qwen_path, device_map):
    model = load(qwen_path, device_map=device_map)
    assert logits(model).device == model.device == torch.device("cpu")


@pytest.mark.parametrize("device", ONE_CPU)
def test_device_of_one_cpu_is_allowed(qwen_path, device):
    assert load(qwen_path, device=device).device == torch.device("cpu")


def test_a_device_is_refused_for_a_missing_model_too():
    check_refused("/no/such/model", "cuda:99", device="cuda:99")


def test_quantized_checkpoint_is_refused(own_path):
    tiny_models.edit_config(own_path, quantization_config={"quant_method": "mxfp4"})
    check_refused(own_path, own_path, "mxfp4", "Mxfp4Config(dequantize=True)")


def test_model_without_experts_is_refused(tmp_path):
    config = transformers.LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    check_refused(tmp_path, tmp_path, "'llama'", "no experts")


def test_unknown_moe_model_is_refused(tmp_path):
    transformers.Llama4TextConfig().save_pretrained(tmp_path)
    check_refused(tmp_path, tmp_path, "llama4", "mixtral")


def test_missing_directory_is_named(tmp_path):
    check_refused(tmp_path / "nowhere", tmp_path / "nowhere", error=FileNotFoundError)
    check_refused("./no/where", "./no/where", error=FileNotFoundError)


def test_missing_config_is_named(own_path):
    (own_path / "config.json").unlink()
    check_refused(own_path, own_path, "config.json", error=FileNotFoundError)


def test_missing_weights_are_named(own_path):
    (own_path / "model.safetensors").unlink()
    check_refused(own_path, own_path, "model.safetensors", error=FileNotFoundError)


def test_pickled_weights_are_refused(own_path):
    (own_path / "model.safetensors").rename(own_path / "pytorch_model.bin")
    check_refused(own_path, "pytorch_model.bin", "safetensors")


def test_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    check_refused(tmp_path, tmp_path, "GGUF")
    check_refused(tmp_path / "model.gguf", "GGUF")


def test_file_instead_of_a_directory_is_named(qwen_path):
    file = qwen_path / "model.safetensors"
    check_refused(file, file, "directory", error=NotADirectoryError)


def test_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    check_refused(tmp_path, tmp_path, "PeftModel.from_pretrained")


def test_missing_shard_is_named(sharded_path, tmp_path):
    path = Path(shutil.copytree(sharded_path, tmp_path / "model"))
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    check_refused(path, shard.name, error=FileNotFoundError)


def test_truncated_checkpoint_is_named(own_path):
    file = own_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    check_refused(own_path, file, "truncated", error=CheckpointError)


def test_missing_tensor_outside_the_experts_is_named(own_path):
    tiny_models.rewrite_tensors(own_path, lambda tensors: tensors.pop("lm_head.weight"))
    check_refused(own_path, own_path, "lm_head.weight", error=CheckpointError)


def test_shard_that_disappears_while_loading_is_named(own_path, monkeypatch):
    """Between reading the headers and opening the files."""
    original = loading._load_without_experts

    def delete_then_load(*arguments):
        result = original(*arguments)
        (own_path / "model.safetensors").unlink()
        return result

    monkeypatch.setattr(loading, "_load_without_experts", delete_then_load)
    for pool in ("ram", "file"):
        shutil.copy(own_path / "config.json", own_path / "keep.json")
        with pytest.raises(FileNotFoundError, match=str(own_path / "model.safetensors")):
            load(own_path, pool=pool)
        tiny_models.make_checkpoint("qwen3_moe", own_path)


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


# Hub ids

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(sharded_path, qwen_path, tmp_path):
    """A Hub cache that holds org/tiny: a single file at "main" and shards at "v2"."""
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    for revision, commit, source in (
        ("main", COMMIT, qwen_path),
        ("v2", COMMIT[::-1], sharded_path),
    ):
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(source, repository / "snapshots" / commit)
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", ["main", "v2", COMMIT[::-1], None])
def test_hub_id_is_read_from_the_cache(hub_cache, qwen_path, revision):
    arguments = {} if revision is None else {"revision": revision}
    model = load("org/tiny", cache_dir=hub_cache, local_files_only=True, **arguments)
    check_same(model, AutoModelForCausalLM.from_pretrained(qwen_path))
    assert model.config.name_or_path == "org/tiny"


def test_offline_mode_reads_the_cache(hub_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache))
    assert load("org/tiny").expert_cache.num_slots == 6


def test_hub_id_that_is_not_cached_is_named(hub_cache):
    arguments = {"cache_dir": hub_cache, "local_files_only": True, "error": OSError}
    check_refused("org/other", "org/other", **arguments)
    check_refused("org/tiny", "v3", revision="v3", **arguments)


def test_missing_shard_of_a_hub_id_is_named(hub_cache):
    shard = sorted(hub_cache.rglob("*-of-*.safetensors"))[1]
    shard.unlink()
    check_refused(
        "org/tiny",
        shard.name,
        revision="v2",
        cache_dir=hub_cache,
        local_files_only=True,
        error=OSError,
    )


def test_subfolder_and_variant_are_found(qwen_path, tmp_path):
    folder = shutil.copytree(qwen_path, tmp_path / "inner")
    (folder / "model.safetensors").rename(folder / "model.fp32.safetensors")
    model = load(tmp_path, subfolder="inner", variant="fp32")
    check_same(model, AutoModelForCausalLM.from_pretrained(qwen_path))


def test_index_may_name_any_files(sharded_path, tmp_path):
    path = Path(shutil.copytree(sharded_path, tmp_path / "model"))
    index_file = path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    names = {name: f"part {name[6:11]}.safetensors" for name in index["weight_map"].values()}
    for old, new in names.items():
        (path / old).rename(path / new)
    index["weight_map"] = {key: names[name] for key, name in index["weight_map"].items()}
    index_file.write_text(json.dumps(index))
    check_same(load(path), AutoModelForCausalLM.from_pretrained(sharded_path))


def test_package_exports_what_users_need():
    assert expertflow.from_pretrained is from_pretrained
