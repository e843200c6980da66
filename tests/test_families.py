"""Every family's experts are found in both checkpoint layouts, and what is wrong is named."""

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

from expertflow import CheckpointError, UnsupportedModelError, model_info
from expertflow.families import FAMILIES, find_family
from expertflow.model_info import open_model

LAYOUTS = [
    (family, fused)
    for family in tiny_models.FAMILIES
    for fused in (False, True)
    if fused or family not in tiny_models.ALWAYS_FUSED
]


def opened(path):
    return open_model(path, "auto", {})


def check_refused(path, *words, error=CheckpointError):
    """Opening must fail, and the message must hold all of `words`."""
    with pytest.raises(error) as caught:
        opened(path)
    for word in words:
        assert str(word) in str(caught.value)


@pytest.fixture
def mixtral(tmp_path):
    return tiny_models.make_checkpoint("mixtral", tmp_path)


@pytest.fixture
def fused_olmoe(tmp_path):
    return tiny_models.make_checkpoint("olmoe", tmp_path, fused=True)


def test_every_family_has_a_tiny_model():
    assert set(tiny_models.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize(("family", "fused"), LAYOUTS)
@pytest.mark.parametrize("max_shard_size", ["1GB", "60KB"])
def test_extents_hold_the_experts(tmp_path, family, fused, max_shard_size):
    tiny_models.make_checkpoint(family, tmp_path, fused=fused, max_shard_size=max_shard_size)
    model = opened(tmp_path)
    assert len(model.index.files) == 1 or max_shard_size == "60KB"
    extents = model.experts.extents(model.layout.segments)
    assert extents.shape[0] == model.skeleton.num_experts_total
    contents = [Path(file).read_bytes() for file in model.index.files]
    modules = dict(tiny_models.make_model(family).requires_grad_(False).named_modules())
    row = 0
    for name in model.skeleton.moe_layers:
        for expert in range(model.skeleton.num_experts):
            slot = bytearray(model.layout.slot_bytes)
            for file, file_offset, slot_offset, num_elements, dtype_code in extents[row]:
                assert dtype_code == 0
                data = contents[file][file_offset : file_offset + 4 * num_elements]
                slot[slot_offset : slot_offset + 4 * num_elements] = data
            for segment, _, offset, num_bytes in model.layout.segments:
                expected = getattr(modules[name], segment)[expert].numpy()
                found = np.frombuffer(slot, np.float32, num_bytes // 4, offset)
                assert np.array_equal(found.reshape(expected.shape), expected)
            row += 1


def test_dense_layers_are_left_out(tmp_path):
    tiny_models.make_checkpoint("qwen3_moe", tmp_path)
    names = opened(tmp_path).skeleton.moe_layers
    assert names == tuple(f"model.layers.{layer}.mlp.experts" for layer in (0, 2, 3))


def test_checkpoint_of_the_base_model_is_read(tmp_path):
    model = tiny_models.make_model("qwen3_moe")
    model.model.save_pretrained(tmp_path)
    assert opened(tmp_path).experts.parts[0][0].num_elements > 0


def test_layers_for_multi_token_prediction_are_left_out(tmp_path):
    tiny_models.make_checkpoint("deepseek_v3", tmp_path)
    expert_bytes = opened(tmp_path).experts.num_bytes

    def add_layer_61(tensors):
        extra = {
            name.replace("layers.3.", "layers.61."): tensor
            for name, tensor in tensors.items()
            if "layers.3." in name
        }
        tensors.update(extra)

    tiny_models.rewrite_tensors(tmp_path, add_layer_61)
    model = opened(tmp_path)
    assert len(model.skeleton.moe_layers) == 3
    assert model.experts.num_bytes == expert_bytes


def test_model_info(tmp_path):
    tiny_models.make_checkpoint("qwen3_moe", tmp_path, torch.bfloat16)
    info = model_info(tmp_path, ram_limit="1GiB")
    assert (info.num_layers, info.num_moe_layers, info.num_experts, info.top_k) == (4, 3, 8, 3)
    assert info.dtype == "bfloat16"
    assert info.expert_bytes == 3 * 24 * 32 * 2
    assert info.expert_bytes_total == 24 * info.expert_bytes
    assert info.smallest_cache_bytes == 3 * info.expert_bytes
    assert info.smallest_layer_cache_bytes == 9 * info.expert_bytes
    plain = tiny_models.make_model("qwen3_moe")
    expert_parameters = 24 * info.expert_bytes // 2
    assert info.other_bytes == 2 * (plain.num_parameters() - expert_parameters)
    assert info.ram_available_bytes == 1 << 30
    assert info.fits_ram_pool
    assert info.largest_ram_pool_cache_bytes == info.expert_bytes_total
    assert info.largest_cache_bytes == info.expert_bytes_total


def test_model_info_when_memory_is_short(tmp_path):
    tiny_models.make_checkpoint("qwen3_moe", tmp_path)
    other_bytes = model_info(tmp_path).other_bytes
    info = model_info(tmp_path, ram_limit=other_bytes + 30_000)
    assert not info.fits_ram_pool
    assert info.largest_ram_pool_cache_bytes == 0
    assert info.largest_cache_bytes == 3 * info.expert_bytes
    info = model_info(tmp_path, ram_limit=other_bytes + 3 * info.expert_bytes - 1)
    assert info.largest_cache_bytes == 0


def test_experts_that_are_not_aligned_get_aligned_slots(tmp_path):
    tiny_models.make_checkpoint("gpt_oss", tmp_path)
    model = opened(tmp_path)
    assert all(offset % 256 == 0 for _, _, offset, _ in model.layout.segments)
    elements = sum(map(prod, model.skeleton.segment_shapes.values()))
    assert model.experts.num_bytes == 4 * 24 * elements < model.sizes.expert_bytes_total


# What is wrong with a checkpoint


def test_missing_tensor_is_named(mixtral):
    name = "model.layers.2.block_sparse_moe.experts.3.w3.weight"
    tiny_models.rewrite_tensors(mixtral, lambda tensors: tensors.pop(name))
    check_refused(mixtral, name, "missing", mixtral)


def test_missing_layer_is_named(mixtral):
    def drop_layer(tensors):
        for name in [name for name in tensors if "layers.1." in name and ".experts." in name]:
            del tensors[name]

    tiny_models.rewrite_tensors(mixtral, drop_layer)
    check_refused(mixtral, "model.layers.1.mlp.experts", mixtral)


def test_wrong_shape_of_an_expert_is_named(mixtral):
    name = "model.layers.0.block_sparse_moe.experts.7.w1.weight"
    tiny_models.rewrite_tensors(
        mixtral, lambda tensors: tensors.update({name: torch.zeros(24, 31)})
    )
    check_refused(mixtral, name, "[24, 31]", "[24, 32]", "model.safetensors")


def test_wrong_shape_of_fused_experts_is_named(fused_olmoe):
    name = "model.layers.2.mlp.experts.down_proj"
    tiny_models.rewrite_tensors(
        fused_olmoe, lambda tensors: tensors.update({name: torch.zeros(8, 16, 32)})
    )
    check_refused(fused_olmoe, name, "[8, 16, 32]", "[8, 32, 16]")


def test_wrong_shape_outside_the_experts_is_named(mixtral):
    name = "model.layers.1.self_attn.q_proj.weight"
    tiny_models.rewrite_tensors(mixtral, lambda tensors: tensors.update({name: torch.zeros(3, 32)}))
    check_refused(mixtral, name, "[3, 32]", "[32, 32]")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_wrong_dtype_of_an_expert_is_named(mixtral, dtype):
    name = "model.layers.0.block_sparse_moe.experts.7.w2.weight"
    tiny_models.rewrite_tensors(
        mixtral, lambda tensors: tensors.update({name: tensors[name].to(dtype)})
    )
    check_refused(mixtral, name, "dtype", error=UnsupportedModelError)


def test_wrong_dtype_outside_the_experts_is_named(mixtral):
    name = "model.layers.1.self_attn.q_proj.weight"
    tiny_models.rewrite_tensors(
        mixtral, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)})
    )
    check_refused(mixtral, name, "F8_E4M3", error=UnsupportedModelError)


@pytest.mark.parametrize("num_experts", [6, 9])
@pytest.mark.parametrize("fused", [False, True])
def test_expert_count_that_disagrees_with_the_config_is_named(tmp_path, num_experts, fused):
    tiny_models.make_checkpoint("olmoe", tmp_path, fused=fused)
    tiny_models.edit_config(tmp_path, num_experts=num_experts)
    words = (f"config.json says {num_experts} experts", "checkpoint has 8", "layers.0.mlp.experts")
    check_refused(tmp_path, *words, tmp_path)


def test_tensors_that_no_expert_has_are_refused(mixtral):
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight_scale"
    tiny_models.rewrite_tensors(mixtral, lambda tensors: tensors.update({name: torch.ones(1)}))
    check_refused(mixtral, name, error=UnsupportedModelError)


def test_layers_in_different_layouts_are_refused(tmp_path):
    tiny_models.make_checkpoint("olmoe", tmp_path)

    def fuse_one_layer(tensors):
        prefix = "model.layers.1.mlp.experts."

        def stack(name):
            return torch.stack([tensors.pop(f"{prefix}{e}.{name}.weight") for e in range(8)])

        tensors[f"{prefix}gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], dim=1)
        tensors[f"{prefix}down_proj"] = stack("down_proj")

    tiny_models.rewrite_tensors(tmp_path, fuse_one_layer)
    check_refused(tmp_path, tmp_path, "fused", error=UnsupportedModelError)


# What is wrong with a config.json


@pytest.mark.parametrize("model_type", ["llama4", "dbrx", "jamba", "granitemoe"])
def test_unknown_moe_family_is_named_with_the_known_ones(model_type):
    config = {"model_type": model_type, "ffn_config": {"moe_num_experts": 16}}
    with pytest.raises(UnsupportedModelError) as caught:
        find_family(config, "some/model")
    for word in ("some/model", repr(model_type), "mixtral", "gpt_oss"):
        assert word in str(caught.value)


@pytest.mark.parametrize("config", [{"model_type": "llama", "hidden_size": 8}, {}])
def test_model_without_experts_is_named(config):
    with pytest.raises(UnsupportedModelError, match="no experts") as caught:
        find_family(config, "some/model")
    assert "some/model" in str(caught.value)


def test_family_with_dense_layers_only_is_refused(tmp_path):
    tiny_models.make_checkpoint("qwen3_moe", tmp_path)
    tiny_models.edit_config(tmp_path, mlp_only_layers=[0, 1, 2, 3])
    check_refused(tmp_path, "no layer with experts", error=UnsupportedModelError)


@pytest.mark.parametrize("top_k", [0, 9])
def test_top_k_that_cannot_be_is_named(mixtral, top_k):
    tiny_models.edit_config(mixtral, num_experts_per_tok=top_k)
    check_refused(mixtral, f"num_experts_per_tok is {top_k}", error=UnsupportedModelError)


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "bitsandbytes", "gptq", "compressed-tensors"])
def test_quantized_checkpoint_is_refused(mixtral, method):
    tiny_models.edit_config(mixtral, quantization_config={"quant_method": method})
    check_refused(mixtral, mixtral, method, "bfloat16", error=UnsupportedModelError)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\xff"])
def test_broken_config_is_named(mixtral, text):
    (mixtral / "config.json").write_text(text)
    check_refused(mixtral, mixtral / "config.json")


def test_config_without_model_type_is_refused(mixtral):
    config = json.loads((mixtral / "config.json").read_text())
    del config["model_type"]
    (mixtral / "config.json").write_text(json.dumps(config))
    check_refused(mixtral, mixtral, error=UnsupportedModelError)
