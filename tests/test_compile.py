"""Compiled functions call every op, once, in order; compiled models give the same bits."""

import os

import pytest
import torch
from random_experts import RandomExperts
from streamed import EVERYTHING_CACHED, SMALLEST, CacheOptions, logits, token_ids, use
from torch import Tensor

import expertflow.experts
from expertflow import ops

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
BACKENDS = ["eager", "aot_eager", "inductor"]
# What `many_effects` calls.
CALLS = ["plan", "wait", "wait", "prefetch", "prefetch"]
CALLS += ["plan", "wait", "wait", "release", "release", "plan", "prefetch", "wait"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return RandomExperts(tmp_path_factory.mktemp("compile") / "experts.bin")


def many_effects(handle: Tensor, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Results are not used, equal calls repeat, and arithmetic stands between the calls."""
    ops.plan(handle, ids, 0)
    ops.wait(handle, 0)
    ops.wait(handle, 1)
    x = x * 2 + 1
    ops.prefetch(handle, ids, 1, 1)
    ops.prefetch(handle, ids, 1, 1)  # nothing left to do
    rows = ops.plan(handle, ids, 1)  # finds what was prefetched
    ops.wait(handle, 0)
    ops.wait(handle, 1)
    ops.release(handle, 0)
    ops.release(handle, 0)
    x = x.sin()
    ops.plan(handle, ids, 2)  # before its prefetch: misses
    ops.prefetch(handle, ids, 2, 1)
    ops.wait(handle, 1)
    return x, rows


def calls_of(function, *arguments):
    """The result, and the names of the ops in the order in which they ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function(*arguments)
    prefix = "expertflow::"
    events = [event for event in profile.events() if event.name.startswith(prefix)]
    events.sort(key=lambda event: event.time_range.start)
    return result, [event.name.removeprefix(prefix) for event in events]


@pytest.mark.parametrize("backend", BACKENDS)
def test_effects_are_counted(experts, backend):
    """No call is dropped, doubled or moved, in the first run and in later ones."""
    cache = experts.cache(6, policy="lru", scope="layer")
    compiled = torch.compile(many_effects, backend=backend, fullgraph=True)
    x = torch.arange(4.0)
    for run, ids in enumerate([[[1, 4]], [[5, 2]], [[0, 3]]]):
        cache.reset_statistics()
        (y, rows), calls = calls_of(compiled, cache.handle, x, torch.tensor(ids))
        # The profile of the first run has the compiler's own calls, on fake tensors.
        assert run == 0 or calls == CALLS
        assert int(cache.handle[1]) == len(CALLS) * (run + 1)
        torch.testing.assert_close(y, (x * 2 + 1).sin())
        assert rows[:, ops.EXPERT].tolist() == ids[0]
        first, second, third = cache.statistics()["layers"]
        assert (first["misses"], first["hits"], first["late_hits"]) == (2, 0, 0)
        assert (second["misses"], second["hits"] + second["late_hits"]) == (0, 2)
        assert (third["misses"], third["hits"], third["late_hits"]) == (2, 0, 0)
        assert third["prefetch_bytes"] == 0
        assert all(layer["wasted_prefetch_bytes"] == 0 for layer in (first, second, third))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_number_of_tokens_may_change(experts, backend):
    """The number of rows of a plan is not known to the compiler."""

    def rows_and_sum(handle, ids, layer):
        rows = ops.plan(handle, ids, layer)
        return rows, rows[:, ops.EXPERT].sum()

    cache = experts.cache(24)
    compiled = torch.compile(rows_and_sum, backend=backend, dynamic=True, fullgraph=True)
    for layer, ids in enumerate([[[1, 4]], [[1, 4], [4, 7]], [[0, 1], [2, 3], [2, 3]]]):
        rows, total = compiled(cache.handle, torch.tensor(ids), layer)
        assert sorted(rows[:, ops.EXPERT].tolist()) == sorted({i for row in ids for i in row})
        assert int(total) == sum({i for row in ids for i in row})
    assert int(cache.handle[1]) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_reach_the_caller(tmp_path, backend):
    """As the op raises them: the compiler leaves out what ops.wait makes of a RuntimeError."""
    experts = RandomExperts(tmp_path / "cut.bin")
    cache = experts.cache(4)
    content, modified = experts.file.read_bytes(), experts.file.stat().st_mtime_ns

    def fetch(handle, ids):
        ops.plan(handle, ids, 2)
        ops.wait(handle, 0)
        ops.wait(handle, 1)
        return ids + 1

    compiled = torch.compile(fetch, backend=backend, fullgraph=True)
    ids = torch.tensor([[3, 5]])
    experts.file.write_bytes(content[:100])
    with pytest.raises(RuntimeError, match=r"expert 3 of MoE layer 2.*cut\.bin"):
        compiled(cache.handle, ids)
    experts.file.write_bytes(content)
    os.utime(experts.file, ns=(modified, modified))  # otherwise it counts as another file
    assert torch.equal(compiled(cache.handle, ids), ids + 1)
    with pytest.raises(IndexError, match="expert id 8"):
        compiled(cache.handle, torch.tensor([[8, 0]]))


FAMILIES_TO_COMPILE = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]


def count_expert_layers(monkeypatch):
    """Note every call of `compute_experts`."""
    calls = []
    original = expertflow.experts.compute_experts

    def counted(cache, layer, *args, **kwargs):
        calls.append(layer)
        return original(cache, layer, *args, **kwargs)

    monkeypatch.setattr(expertflow.experts, "compute_experts", counted)
    return calls


@pytest.mark.parametrize("family", FAMILIES_TO_COMPILE)
def test_whole_model(tiny_streamed, family, monkeypatch):
    """In one graph: the experts do not break it."""
    calls = count_expert_layers(monkeypatch)
    model = tiny_streamed(family)
    expected = logits(use(model, EVERYTHING_CACHED), token_ids(9, 4))
    layers = list(range(model.expert_cache.num_layers))
    assert calls == layers
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for options in (SMALLEST, CacheOptions("50%", "lru")):
        use(model, options)
        for _ in range(2):
            calls.clear()
            with torch.no_grad():
                found = compiled(**token_ids(9, 4), use_cache=False).logits
            assert calls == layers
            assert torch.equal(found, expected)


def test_inductor_on_a_decoder_layer(tiny_streamed, monkeypatch):
    calls = count_expert_layers(monkeypatch)
    model = use(tiny_streamed("mixtral"), SMALLEST)
    expected = logits(model, token_ids(9))
    calls.clear()
    layer = model.model.layers[2]
    monkeypatch.setattr(layer, "forward", torch.compile(layer.forward, fullgraph=True))
    for _ in range(2):
        torch.testing.assert_close(logits(model, token_ids(9)), expected)
    assert calls == [0, 1, 2, 3] * 2
