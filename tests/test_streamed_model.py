"""What a streamed model can do beside generating, and what it refuses rather than do it wrong."""

import copy
import os
import pickle

import pytest
import tiny_models
import torch
from loaded import PROMPT, check_same, logits
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from expertflow import (
    TransferError,
    UnsupportedModelError,
    from_pretrained,
    model_info,
    streamed_model,
)
from expertflow.memory import AvailableMemory


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A Qwen2-MoE checkpoint: it has dense layers and shared experts beside the streamed ones."""
    return tiny_models.make_checkpoint("qwen2_moe", tmp_path_factory.mktemp("qwen2_moe"))


@pytest.fixture
def model(path):
    return from_pretrained(path, progress=False)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (lambda model: model.state_dict(), ["state_dict()", "experts"]),
        (lambda model: model.save_pretrained("/nowhere"), ["save_pretrained()", "copy"]),
        (lambda model: model.push_to_hub("org/model"), ["push_to_hub()", "copy"]),
        (lambda model: model.train(), ["trained"]),
        (copy.deepcopy, ["copied", "from_pretrained"]),
        (copy.copy, ["copied", "from_pretrained"]),
        (pickle.dumps, ["pickled", "from_pretrained"]),
        (lambda model: torch.save(model, "/dev/null"), ["pickled"]),
        (lambda model: model.to("cuda"), ["moved", "device="]),
        (lambda model: model.cuda(), ["moved", "device="]),
        (lambda model: model.to("meta"), ["from cpu to meta"]),
        (lambda model: model.half(), ["torch.float32 to torch.float16", "dtype="]),
        (lambda model: model.to(torch.bfloat16), ["torch.bfloat16"]),
    ],
)
def test_method_that_would_leave_out_the_experts_is_refused(model, path, method, words):
    with pytest.raises(UnsupportedModelError) as caught:
        method(model)
    for word in words:
        assert word in str(caught.value)
    if "copy" in words:
        assert str(path) in str(caught.value)
    check_same(model, AutoModelForCausalLM.from_pretrained(path))


def test_methods_that_change_nothing_work(model):
    assert model.to("cpu") is model
    assert model.float() is model
    assert model.eval() is model
    assert model.train(False) is model
    assert "StreamedQwen2MoeExperts" in repr(model)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert "weight" in model.lm_head.state_dict()


def test_training_through_the_experts_is_refused(model):
    model.requires_grad_(True)
    with pytest.raises(NotImplementedError, match="gradients"):
        model(PROMPT, labels=PROMPT)


@pytest.mark.parametrize(
    "arguments",
    [{"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}],
    ids=["greedy", "beams", "sampling"],
)
def test_generate_agrees_with_transformers(model, path, arguments):
    reference = AutoModelForCausalLM.from_pretrained(path)
    mask = torch.ones_like(PROMPT)
    mask[0, :2] = 0  # prompts of different lengths
    texts = []
    for each in (model, reference):
        torch.manual_seed(3)
        texts.append(each.generate(PROMPT, attention_mask=mask, max_new_tokens=12, **arguments))
    assert torch.equal(*texts)


def test_pipelines_take_the_model(model):
    words = {str(token): token for token in range(tiny_models.VOCAB_SIZE)}
    backend = Tokenizer(WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0")
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    (result,) = generator("5 6 7 8", max_new_tokens=4, do_sample=False, return_tensors=True)
    expected = model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=4, do_sample=False)
    assert result["generated_token_ids"] == expected[0].tolist()


def test_parts_with_experts_are_refused_too(model, path, tmp_path):
    for refused in (
        model.model.state_dict,
        torch.nn.Sequential(model).state_dict,
        lambda: model.model.save_pretrained(tmp_path),
    ):
        with pytest.raises(UnsupportedModelError, match="leave out its experts"):
            refused()
    assert not list(tmp_path.glob("*.safetensors"))
    for convert in (model.model.half, lambda: model.model.to("meta")):
        with pytest.raises(UnsupportedModelError, match=r"from_pretrained\(.*dtype="):
            convert()


def test_loading_experts_into_the_model_is_refused(model, path):
    plain = AutoModelForCausalLM.from_pretrained(path)
    weights = plain.state_dict()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    inner = {name.removeprefix("model."): tensor for name, tensor in zeros.items()}
    for target, given in ((model, zeros), (model.model, inner)):
        with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts\.down_proj"):
            target.load_state_dict(given, strict=False)
        check_same(model, plain)  # nothing was loaded
    others = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    model.load_state_dict(others)
    check_same(model, plain)


# Faults while running


def test_checkpoint_cut_while_running_is_named_and_can_be_repaired(tmp_path):
    tiny_models.make_checkpoint("qwen2_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    content, modified = file.read_bytes(), file.stat().st_mtime_ns
    model = from_pretrained(tmp_path, pool="file", progress=False)
    expected = logits(model)
    with file.open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(TransferError, match=str(file)):
        logits(model)
    with file.open("r+b") as stream:
        stream.write(content)
    os.utime(file, ns=(modified, modified))  # otherwise it counts as another file
    assert torch.equal(logits(model), expected)


def test_deleted_checkpoint_is_still_read(tmp_path):
    tiny_models.make_checkpoint("qwen2_moe", tmp_path)
    model = from_pretrained(tmp_path, pool="file", progress=False)
    expected = logits(model)
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(logits(model), expected)


def test_cache_can_be_replaced(model, path):
    expected = logits(model)
    for size, policy in (("100%", "lru"), (2 * model.expert_cache.slot_bytes, "on_demand")):
        model.set_expert_cache(size, policy=policy)
        assert model.expert_cache.policy == policy
        assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="smallest legal"):
        model.set_expert_cache(1)


@pytest.mark.parametrize("pool", ["ram", "file"])
def test_memory_limit_holds_for_a_new_cache_too(path, pool):
    info = model_info(path)
    half = info.expert_bytes_total // 2
    needed = info.other_bytes + half
    if pool == "ram":
        needed += 24 * -(-info.expert_bytes // 4096) * 4096
    model = from_pretrained(path, expert_cache="50%", pool=pool, ram_limit=needed, progress=False)
    expected = logits(model)
    with pytest.raises(MemoryError, match=f"expert_cache up to {half} "):
        model.set_expert_cache(half + info.expert_bytes)
    assert model.expert_cache.num_bytes == half
    for size in ("25%", half):
        model.set_expert_cache(size)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("pool", ["ram", "file"])
def test_memory_of_the_old_cache_counts_for_the_new_one(path, pool, monkeypatch):
    """With no memory left at all, what the old cache holds is enough for a smaller one."""
    model = from_pretrained(path, expert_cache="50%", pool=pool, progress=False)

    def none_left(ram_limit, held_bytes):
        return AvailableMemory(held_bytes, "test")

    monkeypatch.setattr(streamed_model, "available_memory", none_left)
    with pytest.raises(MemoryError):
        model.set_expert_cache("40%")  # no slot of the old one was filled yet
    expected = logits(model)
    for _ in range(20):
        model(torch.randint(2, tiny_models.VOCAB_SIZE, (4, 16)))
    with pytest.raises(MemoryError):
        model.set_expert_cache("60%")
    model.set_expert_cache("40%")
    assert torch.equal(logits(model), expected)
