"""torch.ops.expertflow: schemas, fakes, opcheck, results and errors."""

import pytest
import torch
from random_experts import RandomExperts
from torch._subclasses import FakeTensorMode

from expertflow import TransferError, ops
from expertflow.experts import compute_experts  # the import registers expertflow::experts

OPS = torch.ops.expertflow
IDS = torch.tensor([[1, 4], [4, 6]])  # three experts of a layer
ALL = 24


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return RandomExperts(tmp_path_factory.mktemp("ops") / "experts.bin")


@pytest.fixture
def resident(experts):
    """A cache in which every plan has the same result: everything is there and stays."""
    cache = experts.cache(ALL, pool="ram")
    ops.plan(cache.handle, IDS, 0)
    return cache


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (OPS.plan, (IDS, 1)),
        (OPS.wait, (2,)),
        (OPS.release, (2,)),
        (OPS.prefetch, (IDS, 2, 1)),
    ],
    ids=["plan", "wait", "release", "prefetch"],
)
def test_opcheck(resident, op, arguments):
    torch.library.opcheck(op.default, (resident.handle, *arguments))


def test_opcheck_experts(resident):
    class Layer(torch.nn.Module):
        def expert_mlp(self, tokens, weights):
            return tokens @ weights["gate_up_proj"][:12].t() @ weights["down_proj"].t()

        def compute(self, hidden_states, expert_ids, expert_weights):
            return compute_experts(
                resident, 1, hidden_states, expert_ids, expert_weights, self.expert_mlp
            )

    resident.layers[1] = layer = Layer()
    for hidden in (torch.randn(2, 16), torch.randn(16, 2).t()):
        arguments = (hidden, IDS, torch.rand(2, 2), 1)
        torch.library.opcheck(OPS.experts.default, (resident.handle, *arguments))
    del layer


@pytest.mark.parametrize("name", ["plan", "wait", "release", "prefetch", "experts"])
def test_only_the_handle_is_mutated(name):
    schema = getattr(OPS, name).default._schema
    mutated = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert mutated == ["cache"]
    assert schema.arguments[0].name == "cache"
    assert not any(result.alias_info for result in schema.returns)


def test_fakes_know_shapes_and_have_no_effect(resident):
    calls, counts = int(resident.handle[1]), resident.statistics()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        handle, ids = mode.from_tensor(resident.handle), mode.from_tensor(IDS)
        mode.shape_env = torch.fx.experimental.symbolic_shapes.ShapeEnv()
        rows = OPS.plan(handle, ids, 0)
        assert rows.shape[1] == 6 and rows.dtype == torch.int64
        assert OPS.wait(handle, 0) is None
        assert OPS.release(handle, 0) is None
        assert OPS.prefetch(handle, ids, 1, 1) is None
        hidden = torch.empty(2, 16)
        out = OPS.experts(handle, hidden, ids, torch.empty(2, 2), 0)
        assert (out.shape, out.dtype, out.device) == (hidden.shape, hidden.dtype, hidden.device)
    assert (int(resident.handle[1]), resident.statistics()) == (calls, counts)


def test_plan_wait_release(experts):
    """Three experts through two slots."""
    cache = experts.cache(2)
    rows = ops.plan(cache.handle, IDS, 1)
    assert rows[:, ops.EXPERT].tolist() == [1, 4, 6]  # in order of first appearance
    assert rows[:, ops.STATE].tolist() == [ops.MISS] * 3
    assert rows[:, ops.WAVE].tolist() == [0, 0, 1]
    assert rows[:, ops.NEXT_ROW].tolist() == [2, ops.NO_ROW, ops.NO_ROW]
    for row, (expert, slot) in enumerate(rows[:, [ops.EXPERT, ops.SLOT]].tolist()):
        ops.wait(cache.handle, row)
        found = cache.slots.weights(slot)
        for role, weights in experts.weights.items():
            assert torch.equal(found[role], weights[1, expert])
        ops.release(cache.handle, row)
    states = ops.plan(cache.handle, torch.tensor([[4, 6]]), 1)[:, ops.STATE]
    assert states.tolist() == [ops.HIT] * 2
    counts = cache.statistics()
    assert (counts["hits"], counts["misses"], counts["evictions"]) == (2, 3, 1)
    assert counts["demand_bytes"] == 3 * cache.slot_bytes


def test_prefetched_experts_are_found(experts):
    cache = experts.cache(6)
    ops.plan(cache.handle, torch.tensor([[0, 1]]), 0)
    ops.prefetch(cache.handle, torch.tensor([3, 5]), 1, 1)
    states = ops.plan(cache.handle, torch.tensor([[3, 5]]), 1)[:, ops.STATE].tolist()
    assert set(states) <= {ops.HIT, ops.LOADING}
    for row in range(2):
        ops.wait(cache.handle, row)
    counts = cache.statistics()["layers"][1]
    assert counts["hits"] + counts["late_hits"] == 2
    assert counts["prefetch_bytes"] + counts["demand_bytes"] == 2 * cache.slot_bytes


def test_every_op_counts_itself(resident):
    number, calls = resident.handle.tolist()
    ops.plan(resident.handle, IDS, 0)
    ops.wait(resident.handle, 0)
    ops.release(resident.handle, 0)
    ops.prefetch(resident.handle, IDS, 1, 1)
    assert resident.handle.tolist() == [number, calls + 4]


def test_ids_and_layers_out_of_range(resident):
    handle = resident.handle
    for expert in (-1, 8, 1 << 32):
        with pytest.raises(IndexError, match=rf"expert id {expert} in MoE layer 1\b"):
            ops.plan(handle, torch.tensor([[0, expert]]), 1)
        with pytest.raises(IndexError, match="expert"):
            ops.prefetch(handle, torch.tensor([expert]), 1, 1)
    for layer in (-1, 3, 1 << 32):
        with pytest.raises(IndexError, match="MoE layer"):
            ops.plan(handle, IDS, layer)
        with pytest.raises(IndexError, match="MoE layer"):
            ops.prefetch(handle, IDS, layer, 1)
    ops.plan(handle, IDS, 0)
    for row in (-1, 3, 1 << 32):
        with pytest.raises(IndexError, match=r"row \S+ is not in the current plan"):
            ops.wait(handle, row)
        with pytest.raises(IndexError, match=r"row \S+ is not in the current plan"):
            ops.release(handle, row)


def test_rows_end_with_the_next_plan(experts):
    cache = experts.cache(6)
    with pytest.raises(IndexError, match="row 0"):
        ops.wait(cache.handle, 0)
    ops.plan(cache.handle, IDS, 0)
    ops.plan(cache.handle, IDS[:1], 1)
    ops.wait(cache.handle, 1)
    with pytest.raises(IndexError, match="row 2"):
        ops.wait(cache.handle, 2)


def test_waiting_for_a_slot_that_was_not_released(experts):
    cache = experts.cache(2)
    ops.plan(cache.handle, IDS, 0)
    with pytest.raises(ValueError, match="row 2 takes over a slot that was not released"):
        ops.wait(cache.handle, 2)


@pytest.mark.parametrize(
    "ids", [IDS.int(), IDS.float(), IDS.t()], ids=["int32", "float32", "not contiguous"]
)
def test_wrong_ids(resident, ids):
    message = "expert_ids must be a contiguous int64 tensor"
    with pytest.raises(ValueError, match=message):
        ops.plan(resident.handle, ids, 0)
    with pytest.raises(ValueError, match=message):
        ops.prefetch(resident.handle, ids, 0, 1)


def test_ids_of_wrong_shape(resident):
    for shape in ((4,), (1, 2, 2), ()):
        with pytest.raises(ValueError, match=r"shape \[tokens, k\]"):
            ops.plan(resident.handle, torch.zeros(shape, dtype=torch.int64), 0)


@pytest.mark.parametrize(
    ("handle", "message"),
    [
        (torch.tensor([1 << 50, 0]), f"no expert cache {1 << 50}"),
        (torch.tensor([0, 0]), "no expert cache 0"),
        (torch.tensor([1]), r"handle tensor of shape \[2\]"),
        (torch.zeros(2, 2, dtype=torch.int64), r"handle tensor of shape \[2\]"),
        (torch.zeros(2), "int64 tensor on the CPU"),
    ],
    ids=["unknown", "zero", "one word", "four words", "float32"],
)
def test_wrong_handles(handle, message):
    for call in (
        lambda: ops.plan(handle, IDS, 0),
        lambda: ops.wait(handle, 0),
        lambda: ops.release(handle, 0),
        lambda: ops.prefetch(handle, IDS, 0, 1),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_handle_of_a_cache_that_is_gone(experts):
    cache = experts.cache(4)
    handle = cache.handle
    ops.plan(handle, IDS, 0)
    del cache
    with pytest.raises(ValueError, match="it was closed"):
        ops.plan(handle, IDS, 0)
    with pytest.raises(ValueError, match="it was closed"):
        ops.wait(handle, 0)


def test_expert_that_cannot_be_read(tmp_path):
    experts = RandomExperts(tmp_path / "cut.bin")
    cache = experts.cache(4)
    experts.file.write_bytes(experts.file.read_bytes()[: cache.slot_bytes])
    ops.plan(cache.handle, torch.tensor([[0, 3]]), 2)
    with pytest.raises(TransferError, match=r"expert 3 of MoE layer 2.*cut\.bin") as caught:
        ops.wait(cache.handle, 1)
    assert isinstance(caught.value, OSError)
    assert "\n" not in str(caught.value)


def test_wrong_options(experts):
    for options, message in (
        ({"num_slots": 1}, "at least 2"),
        ({"num_slots": 25}, "larger than the model"),
        ({"num_slots": 5, "scope": "layer"}, "at least 6"),
        ({"num_slots": 4, "policy": "random"}, "random"),
        ({"num_slots": 4, "scope": "token"}, "token"),
        ({"num_slots": 4, "decay": 0.0}, "decay"),
        ({"num_slots": 4, "top_k": 9}, "top_k is 9"),
        ({"num_slots": 4, "num_threads": 0}, "num_threads"),
    ):
        with pytest.raises(ValueError, match=message):
            experts.cache(**options)
