"""The online predictor: its arithmetic, what it learns, and its files."""

import numpy as np
import pytest
import torch
from reference_predictor import ReferencePredictor, Rule
from safetensors.numpy import save_file
from tiny_models import FAMILIES, make_model

from expertflow import CheckpointError
from expertflow._core import TOKEN_START
from expertflow.predictor import ExpertPredictor
from expertflow.routers import Routers, find_routers

RULES = {
    "softmax": Rule(top_k=2),
    "softmax in groups": Rule(top_k=3, num_groups=4, top_groups=2),
    "sigmoid in groups": Rule(top_k=2, is_sigmoid=True, num_groups=4, top_groups=2),
    "all experts": Rule(top_k=8),
}


def random_routers(rule, layers=5, experts=8, hidden=12, seed=0):
    generator = np.random.default_rng(seed)
    return Routers(
        weights=generator.normal(size=(layers, experts, hidden)).astype(np.float32),
        top_k=rule.top_k,
        biases=generator.normal(size=(layers, experts)).astype(np.float32),
        corrections=0.1 * generator.normal(size=(layers, experts)).astype(np.float32)
        if rule.is_sigmoid
        else None,
        is_sigmoid=rule.is_sigmoid,
        num_groups=rule.num_groups,
        top_groups=rule.top_groups,
    )


def residual_stream(tokens, layers=5, hidden=12, seed=1):
    """Router inputs [tokens, layers, hidden]: every layer adds a little to what came before."""
    generator = np.random.default_rng(seed)
    steps = generator.normal(size=(tokens, layers, hidden)) * 0.6
    steps[:, 0] *= 2
    return steps.cumsum(1).astype(np.float32)


def run_pass(core, hidden, tokens, embeddings=None):
    """A pass over [rows, layers, hidden] of one sequence; the need foreseen, as the reference."""
    core.begin_pass(1, len(hidden), [] if tokens is None else tokens)
    foreseen = {}
    for layer in range(0 if embeddings is None else TOKEN_START, hidden.shape[1]):
        core.observe(layer, hidden[:, layer] if layer >= 0 else embeddings)
        core.predict(layer)
        for distance in range(1, core.num_distances + 1):
            foreseen[layer, distance] = core.need(distance)
        if layer >= 0:
            core.learn(layer)
    return foreseen


@pytest.mark.parametrize("with_embeddings", [True, False])
@pytest.mark.parametrize("with_tokens", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_agrees_with_the_formulas(name, with_tokens, with_embeddings):
    rule, routers = RULES[name], random_routers(RULES[name])
    ours = ExpertPredictor(routers, max_distance=3, num_token_buckets=5)
    reference = ReferencePredictor(routers.weights, rule, 3, 5, routers.biases, routers.corrections)
    hidden = residual_stream(60)
    tokens = np.random.default_rng(2).integers(0, 20, 60) if with_tokens else None
    start = 0
    for rows in [1, 1, 4, 1, 7, *[1] * 20, 6, *[1] * 20]:
        part = slice(start, start + rows)
        ids = None if tokens is None else tokens[part]
        embeddings = 2 * hidden[part, 0] - hidden[part, 1] if with_embeddings else None
        theirs = reference.run_pass(hidden[part].astype(np.float64), ids, embeddings)
        foreseen = run_pass(ours._core, hidden[part], ids, embeddings)
        assert ((TOKEN_START, 3) in foreseen) == with_embeddings
        for place, need in foreseen.items():
            np.testing.assert_allclose(need, theirs[place], atol=2e-4, err_msg=str(place))
        start += rows
    weights = ours._core.state["weights"]
    for index, pair in enumerate(reference.pairs.values()):
        np.testing.assert_allclose(weights[index], pair.weights, atol=2e-4)
    assert np.abs(weights).max() > 0.1
    np.testing.assert_allclose(ours._core.state["token_means"], reference.means, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_familys_own_routing_of_todays_state(family):
    """Fresh, it takes at each layer what the later layer's router would take of the same state."""
    model = make_model(family)
    predictor = ExpertPredictor(find_routers(model))
    blocks = [
        model.get_submodule(name.rpartition(".")[0])
        for name, _ in model.named_modules()
        if name.endswith(".mlp.experts")
    ]
    routers = [getattr(block, "gate", None) or block.router for block in blocks]
    top_k = routers[0].top_k
    for seed in range(20):
        hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
        predictor._core.begin_pass(1, 1, [])
        predictor._core.observe(0, hidden.numpy())
        predictor._core.predict(0)
        assert predictor._core.num_distances == len(routers) - 1
        for distance in range(1, len(routers)):
            with torch.no_grad():
                expected = set(routers[distance](hidden)[2].flatten().tolist())
            need = predictor._core.need(distance)
            assert set(np.argsort(-need)[:top_k].tolist()) == expected
            assert (need > 0.5).sum() == top_k


def recall(ids, routed, distance, top_k):
    """Of what replay foresaw: the share of the routed experts among the first `top_k`."""
    layers = routed.shape[1]
    found = ids[:, : layers - distance, distance - 1, :top_k, None] == routed[:, distance:, None]
    return found.any(-1).mean()


def routed_by(routers, hidden):
    logits = np.einsum("leh,tlh->tle", routers.weights, hidden)
    return np.argsort(-logits, -1)[..., : routers.top_k]


def plain_routers(layers=4, experts=16, hidden=24, top_k=3):
    generator = np.random.default_rng(3)
    weights = generator.normal(size=(layers, experts, hidden)).astype(np.float32)
    return Routers(weights=weights, top_k=top_k)


def test_learns_what_a_layer_changes():
    """Every layer rotates the state: the pre-gate knows nothing, and a linear map everything."""
    routers = plain_routers()
    generator = np.random.default_rng(4)
    states = [generator.normal(size=(4000, 24))]
    for _ in range(3):
        rotation, _ = np.linalg.qr(generator.normal(size=(24, 24)))
        states.append(states[-1] @ rotation)
    hidden = np.stack(states, 1).astype(np.float32)
    routed = routed_by(routers, hidden)
    ids, _ = ExpertPredictor(routers).replay(hidden, [], 3)
    for distance in (1, 2, 3):
        assert recall(ids[:100], routed[:100], distance, 3) < 0.5
        assert recall(ids[-1000:], routed[-1000:], distance, 3) > 0.9


def test_learns_from_the_previous_token_and_from_token_ids():
    """Where today's state says nothing: a slow state at the target, and one for each token id."""
    routers = plain_routers(layers=2)
    generator = np.random.default_rng(5)
    noise = generator.normal(size=(4000, 24))
    slow = np.cumsum(0.1 * generator.normal(size=(4000, 24)), 0)
    hidden = np.stack([noise, slow], 1).astype(np.float32)
    routed = routed_by(routers, hidden)
    ids, _ = ExpertPredictor(routers).replay(hidden, [], 3)
    assert recall(ids[-1000:], routed[-1000:], 1, 3) > 0.8

    tokens = generator.integers(0, 30, 4000)
    hidden[:, 1] = generator.normal(size=(30, 24))[tokens]
    routed = routed_by(routers, hidden)
    ids, _ = ExpertPredictor(routers).replay(hidden, tokens, 3)
    assert recall(ids[-1000:], routed[-1000:], 1, 3) > 0.95
    ids, _ = ExpertPredictor(routers, num_token_buckets=0).replay(hidden, tokens, 3)
    assert recall(ids[-1000:], routed[-1000:], 1, 3) < 0.5


def test_need_is_the_frequency():
    routers = plain_routers(layers=3)
    generator = np.random.default_rng(6)
    hidden = generator.normal(size=(8000, 3, 24)).cumsum(1).astype(np.float32)
    routed = routed_by(routers, hidden)
    ids, need = ExpertPredictor(routers).replay(hidden, [], 16)
    was_routed = (ids[:, :2, 0, :, None] == routed[:, 1:, None]).any(-1)[4000:].ravel()
    need = need[:, :2, 0][4000:].ravel()
    checked = 0
    for low in np.arange(0, 1, 0.1):
        inside = (need >= low) & (need < low + 0.1)
        if inside.sum() > 1000:
            checked += 1
            assert need[inside].mean() == pytest.approx(was_routed[inside].mean(), abs=0.04)
    assert checked >= 6


def test_is_deterministic():
    routers, hidden = plain_routers(), residual_stream(200, layers=4, hidden=24)
    tokens = np.arange(200) % 7
    runs = [ExpertPredictor(routers).replay(hidden, tokens, 5) for _ in range(2)]
    assert np.array_equal(runs[0][0], runs[1][0]) and np.array_equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, 1e30])
def test_rows_that_are_not_finite_teach_nothing(bad):
    routers, hidden = plain_routers(), residual_stream(60, layers=4, hidden=24)
    hidden[20, 2] = bad
    predictor = ExpertPredictor(routers)
    predictor.replay(hidden, np.arange(60), 5)
    assert all(np.isfinite(array).all() for array in predictor._core.state.values())


def run_layer(predictor, layer, hidden, max_distance=8):
    need = predictor.foresee(layer, hidden, max_distance)
    predictor.learn(layer)
    return need


def test_foresees_no_farther_than_it_is_asked_to():
    routers, hidden = plain_routers(), residual_stream(300, layers=4, hidden=24)
    predictor = ExpertPredictor(routers)
    for states in torch.from_numpy(hidden):
        predictor.note_tokens(torch.tensor([[7]]))
        needs = [run_layer(predictor, layer, states[layer : layer + 1], 2) for layer in range(4)]
    assert [need.shape for need in needs] == [(2, 16), (2, 16), (1, 16), (0, 16)]
    assert all(0 < (need > 0.4).sum() < need.size for need in needs[:3])
    assert predictor._core.state["token_counts"][:, 7].tolist() == [300.0] * 4
    assert predictor.foresee(0, torch.from_numpy(hidden[0, :1]), 0).shape == (0, 16)


def test_learns_of_one_layer_more_than_it_is_asked():
    hidden = torch.from_numpy(residual_stream(40, layers=4, hidden=24))
    asked_all, asked_one = predictors = [ExpertPredictor(plain_routers()) for _ in range(2)]
    for states in hidden:
        for layer in range(4):
            for predictor, max_distance in zip(predictors, (8, 1), strict=True):
                run_layer(predictor, layer, states[layer : layer + 1], max_distance)
    all_learned, one_learned = (p._core.state["weights"] for p in (asked_all, asked_one))
    has_learned = one_learned.any(axis=(1, 2))
    assert not has_learned.all()
    assert (all_learned.any(axis=(1, 2)) & ~has_learned).any()
    assert (all_learned[has_learned] == one_learned[has_learned]).all()
    # From the layers 0 to 2: one ahead each, and the one behind it from 0 and 1.
    assert has_learned.sum() == 5


def test_hook_takes_the_last_rows_of_each_sequence():
    routers = plain_routers()
    predictor = ExpertPredictor(routers)
    hidden = torch.randn(2 * 50, 24)
    predictor.note_tokens(torch.arange(100).view(2, 50))
    for layer in range(4):
        run_layer(predictor, layer, hidden)
    seen = predictor._core.state["token_counts"][0].nonzero()[0].tolist()
    assert seen == [46, 47, 48, 49, 96, 97, 98, 99]


def test_passes_that_take_turns_do_no_harm():
    """As when two threads run one model: rows change between layers, and tokens are of another."""
    predictor = ExpertPredictor(plain_routers())
    for layer, rows in [(0, 1), (1, 1), (2, 5), (3, 1), (0, 2), (1, 3), (1, 3), (3, 1)]:
        predictor.note_tokens(torch.tensor([[-1]]) if layer == 3 else torch.tensor([[1, 2, 3]]))
        run_layer(predictor, layer, torch.randn(rows, 24))
        assert predictor.num_distances == 3 - layer
    assert predictor._core.state["token_counts"].sum(0)[1:4].tolist() == [2, 2, 2]


def test_wrong_calls_are_refused():
    predictor = ExpertPredictor(plain_routers())
    core = predictor._core
    with pytest.raises(ValueError, match="0 rows"):
        core.observe(0, np.zeros(24, np.float32))
    core.begin_pass(1, 1, [])
    with pytest.raises(IndexError, match="layer 4"):
        core.observe(4, np.zeros(24, np.float32))
    with pytest.raises(ValueError, match="23 values"):
        core.observe(0, np.zeros(23, np.float32))
    with pytest.raises(RuntimeError, match="not observed"):
        core.predict(0)
    with pytest.raises(ValueError, match="2 token ids for a pass of 1 rows"):
        core.begin_pass(1, 1, [1, 2])
    with pytest.raises(ValueError, match="max_distance=9"):
        ExpertPredictor(plain_routers(), max_distance=9)
    with pytest.raises(ValueError, match="groups"):
        ExpertPredictor(Routers(plain_routers().weights, 3, num_groups=5, top_groups=1))
    with pytest.raises(ValueError, match="biases of the routers"):
        ExpertPredictor(Routers(plain_routers().weights, 3, biases=np.zeros((4, 15), np.float32)))


def untrained():
    return ExpertPredictor(plain_routers(), max_distance=2, num_token_buckets=9)


@pytest.fixture
def trained():
    predictor = untrained()
    predictor.replay(residual_stream(100, layers=4, hidden=24), np.arange(100), 5)
    return predictor


def test_saves_and_loads_all_that_it_learned(trained, tmp_path):
    trained.save(tmp_path / "p.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]
    other = untrained()
    other.load(tmp_path / "p.safetensors")
    for name, array in trained._core.state.items():
        assert np.array_equal(array, other._core.state[name]), name
        assert array.any(), name
    more, fresh = residual_stream(50, layers=4, hidden=24, seed=8), untrained()
    assert not np.array_equal(other.replay(more, [], 5)[0], fresh.replay(more, [], 5)[0])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"max_distance": 3, "num_token_buckets": 9}, "max_distance"),
        ({"max_distance": 2, "num_token_buckets": 8}, "token buckets"),
    ],
)
def test_files_of_other_sizes_are_refused(trained, tmp_path, change, name):
    trained.save(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=f"saved for {name}"):
        ExpertPredictor(plain_routers(), **change).load(tmp_path / "p.safetensors")
    other_model = ExpertPredictor(plain_routers(hidden=16), max_distance=2, num_token_buckets=9)
    with pytest.raises(ValueError, match="hidden size 24, and this predictor has 16"):
        other_model.load(tmp_path / "p.safetensors")


def test_bad_files_are_refused_and_change_nothing(trained, tmp_path):
    file = tmp_path / "p.safetensors"
    before = {name: array.copy() for name, array in trained._core.state.items()}
    with pytest.raises(FileNotFoundError, match=r"p\.safetensors"):
        trained.load(file)
    file.write_bytes(b"not a predictor")
    with pytest.raises(CheckpointError, match="not a saved predictor"):
        trained.load(file)
    arrays = trained._learned().tensors()
    save_file(arrays, file)
    with pytest.raises(CheckpointError, match="format"):
        trained.load(file)
    metadata = trained._learned().metadata()
    save_file(arrays | {"deviations": np.zeros(7, np.float32)}, file, metadata)
    with pytest.raises(CheckpointError, match="deviations should be"):
        trained.load(file)
    save_file({k: v for k, v in arrays.items() if k != "scalars"}, file, metadata)
    with pytest.raises(CheckpointError, match="scalars should be"):
        trained.load(file)
    arrays["weights"] = np.full_like(before["weights"], np.nan)
    save_file(arrays, file, metadata)
    with pytest.raises(CheckpointError, match="not finite"):
        trained.load(file)
    assert all(np.array_equal(before[name], array) for name, array in trained._core.state.items())
