"""What `from_pretrained` refuses, and that it names the culprit."""

import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from loaded import check_refused, load, logits

from expertflow import CheckpointError, loading


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
