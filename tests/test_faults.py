"""What goes wrong while a model runs: an error that names the culprit, and never a wrong token."""

import os
import signal

import pytest
import tiny_models
import torch
from streamed import (
    EVERYTHING_CACHED,
    POLICIES,
    SMALLEST,
    CacheOptions,
    generate,
    logits,
    token_ids,
    use,
)

import expertflow
from expertflow import TransferError
from expertflow.experts import StreamedExperts

PROMPTS = token_ids(30, 12)
NEW_TOKENS = 6
TRANSFER_ERROR = r"cannot load expert [0-7] of MoE layer [0-3]: \S*/model\S*\.safetensors\b"


@pytest.fixture
def path(tmp_path):
    """A checkpoint in shards that the test may damage."""
    return tiny_models.make_checkpoint("mixtral", tmp_path / "model", max_shard_size="60KB")


@pytest.fixture
def model(path):
    return use(
        expertflow.from_pretrained(path, expert_cache="25%", pool="file", progress=False), SMALLEST
    )


@pytest.fixture
def expected(tiny_streamed):
    return generate(use(tiny_streamed("mixtral"), EVERYTHING_CACHED), PROMPTS, NEW_TOKENS)


class Shards(dict):
    """Contents by file, and when the files were last modified."""

    def __init__(self, contents, modified):
        super().__init__(contents)
        self.modified = modified


@pytest.fixture
def shards(path):
    """The shards that hold experts, and what is in them."""
    index = (path / "model.safetensors.index.json").read_text()
    files = {name for line in index.splitlines() if ".experts." in line for name in line.split('"')}
    shards = {path / name: (path / name).read_bytes() for name in files if name.endswith("tensors")}
    assert len(shards) > 1
    modified = {file: file.stat().st_mtime_ns for file in shards}
    return Shards(shards, modified)


def cut(shards):
    for file in shards:
        os.truncate(file, 2000)


def restore(shards):
    """Writes into the same files, those that the model has open, as if they had never changed."""
    for file, content in shards.items():
        file.write_bytes(content)
        os.utime(file, ns=(shards.modified[file], shards.modified[file]))


def test_shard_that_is_rewritten(model, shards, expected):
    for file, content in shards.items():
        header_bytes = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(content[:header_bytes] + bytes(len(content) - header_bytes))
    with pytest.raises(TransferError, match="changed while in use"):
        generate(model, PROMPTS, NEW_TOKENS)
    restore(shards)
    assert torch.equal(generate(model, PROMPTS, NEW_TOKENS), expected)


def test_shard_that_is_cut(model, shards, expected):
    cut(shards)
    for _ in range(2):
        with pytest.raises(TransferError, match=TRANSFER_ERROR) as caught:
            generate(model, PROMPTS, NEW_TOKENS)
        assert isinstance(caught.value, OSError)
    restore(shards)
    assert torch.equal(generate(model, PROMPTS, NEW_TOKENS), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_shard_that_is_cut_between_tokens(model, shards, expected, policy):
    use(model, CacheOptions("25%", policy))

    def cut_later(ids, scores):
        if ids.shape[1] == PROMPTS["input_ids"].shape[1] + 2:
            cut(shards)
        return scores

    with pytest.raises(TransferError, match=TRANSFER_ERROR):
        generate(model, token_ids(30, 12, seed=9), 40, logits_processor=[cut_later])
    restore(shards)
    assert torch.equal(generate(model, PROMPTS, NEW_TOKENS), expected)


def test_one_layer_that_cannot_be_read(model, shards, expected):
    """The error names that layer; those before it were computed."""
    last = [file for file, content in shards.items() if b"layers.3.block_sparse_moe" in content]
    for file in last:
        os.truncate(file, 2000)
    with pytest.raises(TransferError, match=r"of MoE layer [23]: .*cut while in use"):
        generate(model, PROMPTS, NEW_TOKENS)
    restore(shards)
    assert torch.equal(generate(model, PROMPTS, NEW_TOKENS), expected)


def test_prefetch_that_fails_is_dropped(model, shards, expected):
    use(model, CacheOptions("50%"))
    cut(shards)
    for layer in range(4):
        model.expert_cache.prefetch(layer, torch.arange(8))
    with pytest.raises(TransferError, match=TRANSFER_ERROR):
        logits(model, PROMPTS)
    restore(shards)
    for layer in range(4):
        model.expert_cache.prefetch(layer, torch.arange(8))
    assert torch.equal(generate(model, PROMPTS, NEW_TOKENS), expected)


def test_shards_that_are_deleted(model, shards, expected):
    """The files stay open."""
    for file in shards:
        file.unlink()
    assert torch.equal(generate(model, PROMPTS, NEW_TOKENS), expected)


def test_shards_that_are_replaced(model, shards, expected, tmp_path):
    """By a download of another version, say: the model stays what it was."""
    for file in shards:
        other = tmp_path / "other"
        other.write_bytes(bytes(len(shards[file])))
        other.rename(file)
    assert torch.equal(generate(model, PROMPTS, NEW_TOKENS), expected)


def test_ram_pool_needs_no_files(path, shards, expected):
    model = use(expertflow.from_pretrained(path, pool="ram", progress=False), SMALLEST)
    cut(shards)
    assert torch.equal(generate(model, PROMPTS, NEW_TOKENS), expected)


@pytest.mark.parametrize("options", [SMALLEST, CacheOptions("50%", "two_level_lru")], ids=str)
@pytest.mark.parametrize("call", [1, 4, 17, 60])
def test_interrupt_in_the_middle_of_a_layer(model, expected, monkeypatch, options, call):
    """Rows of a plan stay unused, transfers run on; the next call finds its way."""
    use(model, options)
    original = StreamedExperts.expert_mlp
    calls = 0

    def interrupted(self, tokens, weights):
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signal.SIGINT)
        return original(self, tokens, weights)

    monkeypatch.setattr(StreamedExperts, "expert_mlp", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, NEW_TOKENS)
    assert calls == call
    assert torch.equal(generate(model, PROMPTS, NEW_TOKENS), expected)


def test_interrupt_between_tokens(model, expected):
    def interrupt(ids, scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, NEW_TOKENS, logits_processor=[interrupt])
    assert torch.equal(generate(model, PROMPTS, NEW_TOKENS), expected)


def test_gradients_are_refused(model):
    """Of hidden states too: those of the experts would be missing from them."""
    hidden = model.get_input_embeddings()(PROMPTS["input_ids"]).requires_grad_()
    with pytest.raises(NotImplementedError, match="without gradients"):
        model(inputs_embeds=hidden)
    with torch.no_grad():
        model(inputs_embeds=hidden)


def test_experts_without_a_cache(model):
    experts = next(m for m in model.modules() if isinstance(m, StreamedExperts))
    experts.cache = None
    with pytest.raises(RuntimeError, match="not bound to a cache"):
        logits(model, PROMPTS)
