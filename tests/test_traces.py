"""Trace files: what is read as is, and what is refused with its place."""

from pathlib import Path

import numpy as np
import pytest

from expertflow.traces import Trace, load_trace, make_trace, save_trace

TOKENS, LAYERS, TOP_K, EXPERTS, DISTANCES, CANDIDATES = 10, 3, 2, 8, 2, 4

FIRST_SHAPE = (TOKENS, DISTANCES, CANDIDATES)
PREDICTIONS = (
    "predicted_ids", "predicted_need", "first_predicted_ids", "first_predicted_need"
)  # fmt: skip


def arrays(**changes):
    random = np.random.default_rng(1)
    shape = (TOKENS, LAYERS, DISTANCES, CANDIDATES)
    whole = {
        "expert_ids": random.integers(0, EXPERTS, (TOKENS, LAYERS, TOP_K)).astype(np.uint8),
        "num_experts": np.int64(EXPERTS),
        "sequence_offsets": np.array([0, 4, TOKENS]),
        "weights": random.random((TOKENS, LAYERS, TOP_K)).astype(np.float16),
        "predicted_ids": random.integers(0, EXPERTS, shape).astype(np.uint8),
        "predicted_need": random.random(shape).astype(np.float16),
        "first_predicted_ids": random.integers(0, EXPERTS, FIRST_SHAPE).astype(np.uint8),
        "first_predicted_need": random.random(FIRST_SHAPE).astype(np.float16),
    }
    whole |= changes
    return {name: value for name, value in whole.items() if value is not None}


def with_value(name, place, value, dtype=None):
    array = arrays()[name]
    array = array.astype(dtype or array.dtype)
    array[place] = value
    return {name: array}


def save(path: Path, **changes) -> Path:
    np.savez(path, **arrays(**changes))
    return path


def same(a: Trace, b: Trace) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("expert_ids", "sequence_offsets", "weights", *PREDICTIONS)
    )


def test_reads_what_was_saved(tmp_path):
    trace = make_trace(arrays())
    save_trace(tmp_path / "t.npz", trace)
    assert same(load_trace(tmp_path / "t.npz"), trace)
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.int64])
def test_reads_any_integer_ids_and_only_what_is_required(tmp_path, dtype):
    ids = arrays()["expert_ids"].astype(dtype)
    path = save(tmp_path / "t.npz", expert_ids=ids, weights=None, **dict.fromkeys(PREDICTIONS))
    trace = load_trace(path)
    assert np.array_equal(trace.expert_ids, ids)
    assert trace.predicted_ids is None and trace.first_predicted_ids is None
    assert (trace.num_tokens, trace.num_layers, trace.top_k) == (TOKENS, LAYERS, TOP_K)


def test_saves_ids_that_need_two_bytes(tmp_path):
    ids = np.full((2, 1, 1), 300)
    trace = make_trace(
        {"expert_ids": ids, "num_experts": np.int64(512), "sequence_offsets": [0, 2]}
    )
    save_trace(tmp_path / "t.npz", trace)
    assert np.array_equal(load_trace(tmp_path / "t.npz").expert_ids, ids)


def test_head_keeps_the_sequences_that_it_has():
    head = make_trace(arrays()).head(6)
    assert head.num_tokens == 6
    assert list(head.sequence_offsets) == [0, 4, 6]
    assert len(head.weights) == 6
    assert all(len(getattr(head, name)) == 6 for name in PREDICTIONS)
    assert list(make_trace(arrays()).head(4).sequence_offsets) == [0, 4]
    assert make_trace(arrays()).head(1000).num_tokens == TOKENS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_ids": None}, "expert_ids is missing"),
        ({"num_experts": None}, "num_experts is missing"),
        ({"sequence_offsets": None}, "sequence_offsets is missing"),
        ({"expert_ids": np.zeros((3, 4), np.uint8)}, r"expert_ids must have shape .*\[3, 4\]"),
        ({"expert_ids": np.zeros((0, 3, 2), np.uint8)}, r"expert_ids .* not \[0, 3, 2\]"),
        ({"expert_ids": np.zeros((TOKENS, 3, 2))}, "expert_ids must hold integers, not float64"),
        (
            {"expert_ids": np.zeros((TOKENS, 3, 9), np.uint8)},
            "expert_ids has 9 experts for each token, but num_experts is 8",
        ),
        (
            with_value("expert_ids", (7, 2, 1), 8),
            "expert_ids at token 7, layer 2, position 1 is 8, but the experts are 0 to 7",
        ),
        (
            with_value("expert_ids", (0, 0, 1), -1, np.int16),
            "expert_ids at token 0, layer 0, position 1 is -1",
        ),
        ({"num_experts": np.array([8])}, r"num_experts must be one integer, not int64 of shape"),
        ({"num_experts": np.float32(8)}, "num_experts must be one integer, not float32"),
        ({"num_experts": np.int64(0)}, "num_experts is 0"),
        ({"num_experts": np.int64(70000)}, "num_experts is 70000, not 1 to 65536"),
        ({"sequence_offsets": np.array([1, TOKENS])}, r"sequence_offsets\[0\] is 1"),
        ({"sequence_offsets": np.array([0, 6, 4, TOKENS])}, r"sequence_offsets\[2\] is 4, less"),
        (
            {"sequence_offsets": np.array([0, 4, TOKENS + 1])},
            r"sequence_offsets\[2\] is 11, but there are 10 tokens",
        ),
        ({"sequence_offsets": np.array([0.0, 10.0])}, "sequence_offsets must be .* float64"),
        ({"sequence_offsets": np.array([0])}, "sequence_offsets must be at least two"),
        ({"weights": np.zeros((TOKENS, 3, 3), np.float16)}, r"weights must have shape \[10, 3, 2"),
        ({"weights": np.zeros((TOKENS, 3, 2), int)}, "weights must hold floating-point numbers"),
        ({"predicted_need": None}, "must come together"),
        (
            with_value("predicted_ids", (3, 1, 0, 2), 99),
            "predicted_ids at token 3, layer 1, distance 0, candidate 2 is 99",
        ),
        (
            with_value("predicted_need", (9, 2, 1, 3), np.nan),
            "predicted_need at token 9, layer 2, distance 1, candidate 3 is nan",
        ),
        (with_value("predicted_need", (0, 0, 0, 0), 1.5), "predicted_need .* is 1.5"),
        (
            {"predicted_ids": np.zeros((TOKENS, 4, 2, 4), np.uint8)},
            "predicted_ids is of 4 layers, but expert_ids of 3",
        ),
        (
            {"predicted_need": np.zeros((TOKENS, 3, 2, 3), np.float16)},
            r"predicted_need must have shape \[10, 3, 2, 4\]",
        ),
        ({"first_predicted_ids": None}, "first_predicted_ids .* must come together"),
        (
            with_value("first_predicted_ids", (3, 1, 2), 8),
            "first_predicted_ids at token 3, distance 1, candidate 2 is 8",
        ),
        (
            with_value("first_predicted_need", (9, 1, 3), -1),
            "first_predicted_need at token 9, distance 1, candidate 3 is -1",
        ),
        ({"predicted_ids": None, "predicted_need": None}, "predicted_ids is missing"),
        (
            {
                "first_predicted_ids": np.zeros((TOKENS, 3, 4), np.uint8),
                "first_predicted_need": np.zeros((TOKENS, 3, 4), np.float16),
            },
            r"first_predicted_ids has distances and candidates \[3, 4\], but .* \[2, 4\]",
        ),
    ],
)
def test_refuses_what_does_not_fit_and_names_the_place(tmp_path, changes, message):
    path = save(tmp_path / "wrong.npz", **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_trace(path)
    assert str(path) in str(error.value)


def test_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "none.npz")
    text = tmp_path / "text.npz"
    text.write_text("no trace")
    one_array = tmp_path / "one.npy"
    np.save(one_array, np.zeros(3))
    pickled = save(tmp_path / "pickled.npz", expert_ids=np.array([{}], dtype=object))
    cut = save(tmp_path / "cut.npz")
    cut.write_bytes(cut.read_bytes()[:-200])
    for path in (text, one_array, pickled, cut):
        with pytest.raises(ValueError, match=str(path)):
            load_trace(path)
