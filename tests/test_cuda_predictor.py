"""The predictor on a GPU: against the formulas in numpy, in CUDA graphs, behind a model."""

import numpy as np
import pytest
import torch
from reference_predictor import ReferencePredictor
from test_predictor import RULES, random_routers, residual_stream

from expertflow._core import TOKEN_START
from expertflow.device_predictor import DevicePredictor
from expertflow.predictor import ExpertPredictor

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA device here"
)
CUDA = torch.device("cuda", 0)
HIDDEN = 16


def on_device(rule, max_distance=3):
    """A predictor on the device, the one on the host that it came from, and the routers."""
    routers = random_routers(rule, hidden=HIDDEN)
    host = ExpertPredictor(routers, max_distance=max_distance, num_token_buckets=5)._core
    return DevicePredictor(host, CUDA, HIDDEN), host, routers


@pytest.mark.parametrize("with_embeddings", [True, False])
@pytest.mark.parametrize("with_tokens", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_agrees_with_the_formulas(name, with_tokens, with_embeddings):
    rule = RULES[name]
    predictor, host, routers = on_device(rule)
    reference = ReferencePredictor(routers.weights, rule, 3, 5, routers.biases, routers.corrections)
    tokens = np.random.default_rng(2).integers(0, 20, 80)
    for row, states in enumerate(residual_stream(80, hidden=HIDDEN)):
        ids = tokens[row : row + 1] if with_tokens else None
        embedding = 2 * states[0] - states[1]
        seen = dict(enumerate(states))
        if with_embeddings:
            seen = {TOKEN_START: embedding} | seen
        theirs = reference.run_pass(
            states[None].astype(np.float64), ids, embedding[None] if with_embeddings else None
        )
        predictor.begin_pass(torch.tensor(ids[0]) if with_tokens else None)
        for layer, values in seen.items():
            state = torch.from_numpy(values).to(CUDA)
            predictor.observe(layer, state[None])
            for distance in range(1, predictor.num_distances + 1):
                found, expected = predictor.need(distance), theirs[layer, distance]
                np.testing.assert_allclose(found, expected, atol=5e-4, err_msg=f"{row} {layer}")
            if layer >= 0:
                predictor.learn(layer)
    predictor.copy_to(host)
    for index, pair in enumerate(reference.pairs.values()):
        np.testing.assert_allclose(host.state["weights"][index], pair.weights, atol=5e-4)
    np.testing.assert_allclose(host.state["token_means"], reference.means, atol=5e-5)
    assert np.abs(host.state["weights"]).max() > 0.1


def run_eagerly(predictor, states, token):
    predictor.begin_pass(token)
    for layer, state in enumerate(states):
        predictor.observe(layer, state[None])
        predictor.learn(layer)


def test_a_captured_pass_learns_as_an_eager_one():
    rule = RULES["sigmoid in groups"]
    eager, host, _ = on_device(rule)
    captured, other_host, _ = on_device(rule)
    stream = residual_stream(30, hidden=HIDDEN)
    states = torch.zeros(5, HIDDEN, device=CUDA)
    token = torch.zeros(1, dtype=torch.int64, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_eagerly(captured, states, token)
        captured.join_learning()
    for row, values in enumerate(torch.from_numpy(stream).to(CUDA)):
        states.copy_(values)
        token.fill_(row % 7)
        graph.replay()
        run_eagerly(eager, values, torch.tensor(row % 7))
    eager.copy_to(host)
    captured.copy_to(other_host)
    for name, array in host.state.items():
        assert np.array_equal(array, other_host.state[name]), name
        assert array.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_takes_router_inputs_of_any_float_type_and_alignment(dtype):
    predictor, host, _ = on_device(RULES["softmax"])
    state = torch.from_numpy(residual_stream(1, hidden=HIDDEN)[0, 0]).to(CUDA, dtype)
    host.begin_pass(1, 1, np.array([3]))
    host.observe(0, state.float().cpu().numpy())
    host.predict(0)
    for offset in (0, 1):
        storage = torch.empty(HIDDEN + offset, dtype=dtype, device=CUDA)
        storage[offset:] = state
        predictor.begin_pass(torch.tensor([[3]], dtype=torch.int32, device=CUDA))
        predictor.observe(0, storage[offset:][None])
        for distance in (1, 2, 3):
            np.testing.assert_allclose(predictor.need(distance), host.need(distance), atol=1e-5)


def test_sizes_that_the_kernels_do_not_take_stay_on_the_host():
    routers = random_routers(RULES["softmax"], hidden=12)
    host = ExpertPredictor(routers, max_distance=3)._core
    with pytest.raises(ValueError):
        DevicePredictor(host, CUDA, 12)


def run_pass(predictor, states, token_ids, device):
    """A pass over [rows, layers, hidden] of one sequence: what each layer foresaw."""
    predictor.note_tokens(torch.tensor(token_ids, device=device))
    needs = []
    for layer in range(states.shape[1]):
        hidden = torch.from_numpy(states[:, layer]).to(device)
        predictor.begin_layer(layer, hidden)
        needs.append(predictor.foresee(layer, hidden, 3))
        predictor.learn(layer)
    return needs


def test_a_models_predictor_moves_between_host_and_device(tmp_path):
    """Batches are foreseen on the host, a single sequence on the device, by its last row."""
    routers = random_routers(RULES["softmax in groups"], hidden=HIDDEN)
    ours, host = (ExpertPredictor(routers, max_distance=3, num_token_buckets=5) for _ in range(2))
    stream = residual_stream(60, hidden=HIDDEN)
    start = 0
    for rows, is_batch in [(7, False), (1, False), (4, True), (1, False), *[(2, True)] * 10]:
        ids = list(range(start, start + rows))
        token_ids = [[i] for i in ids] if is_batch else [ids]
        run_pass(ours, stream[start : start + rows], token_ids, CUDA)
        assert ours._is_on_device != is_batch
        start += rows
    ours.save(tmp_path / "learned.safetensors")
    assert ours._core.state["token_counts"].sum() == (3 + 4 + 20) * stream.shape[1]
    for predictor in (ours, host):
        predictor.load(tmp_path / "learned.safetensors")
    foreseen = run_pass(ours, stream[50:51], [[50]], CUDA)
    assert ours._is_on_device
    expected_needs = run_pass(host, stream[50:51], [[50]], "cpu")
    for found, expected in zip(foreseen, expected_needs, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert found.any() or not found.size
