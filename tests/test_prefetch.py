"""Models that prefetch what a predictor foresees: the same bits, and experts that arrive early."""

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from streamed import EVERYTHING_CACHED, CacheOptions, generate, logits, same_bits, token_ids, use
from tiny_models import FAMILIES, VOCAB_SIZE

import expertflow
from expertflow.experts import StreamedExperts
from expertflow.predictor import ExpertPredictor, predictor_bytes

PROMPTS = token_ids(23, 9, 1)


@pytest.fixture
def predicting(tiny_streamed):
    """Gives a shared model a fresh predictor, and takes it away after the test."""
    changed = []

    def prepare(family, options=EVERYTHING_CACHED):
        model = use(tiny_streamed(family), options)
        model.set_predictor(ExpertPredictor.for_model(model, max_distance=3))
        model.expert_cache.set_horizon("auto")
        changed.append(model)
        return model

    yield prepare
    for model in changed:
        model.set_predictor(None)


def outputs(model):
    return [
        logits(model, PROMPTS),
        generate(model, PROMPTS, 12),
        *generate(
            model, token_ids(11), 12, output_logits=True, return_dict_in_generate=True
        ).logits,
    ]


@pytest.mark.parametrize("size", ["smallest", "25%", "50%"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefetching_changes_no_bit(tiny_streamed, predicting, family, size):
    expected = outputs(use(tiny_streamed(family), EVERYTHING_CACHED))
    model = predicting(family, CacheOptions(size))
    for horizon in ("auto", 1, 3):
        model.expert_cache.set_horizon(horizon)
        assert same_bits(outputs(model), expected)
    assert size == "smallest" or model.expert_cache.statistics()["prefetch_bytes"] > 0


def test_horizon_0_prefetches_nothing_and_learns(predicting):
    model = predicting("qwen3_moe", CacheOptions("50%"))
    model.expert_cache.set_horizon(0)
    generate(model, PROMPTS, 5)
    assert model.expert_cache.statistics()["prefetch_bytes"] == 0
    assert model.predictor._core.state["weights"].any()


def test_tokens_of_each_pass_are_known(predicting):
    model = predicting("qwen3_moe")
    prompt = token_ids(5)
    generated = generate(model, prompt, 6)[0, :-1].tolist()
    counts = model.predictor._core.state["token_counts"]
    assert {int(token) for token in counts[0].nonzero()[0]} == set(generated)
    assert counts[0].sum() == len(generated)


def first_layer_prefetches(model):
    """Bytes that were fetched ahead for layer 0, the others' weights being of no use for it."""
    return model.expert_cache.statistics()["layers"][0]["prefetch_bytes"]


def test_first_layers_are_foreseen_from_the_embedding(tiny_streamed, predicting):
    model = use(tiny_streamed("qwen3_moe"), CacheOptions("50%"))
    generate(model, token_ids(5), 6)
    assert first_layer_prefetches(model) == 0
    model = predicting("qwen3_moe", CacheOptions("50%"))
    model.expert_cache.set_horizon(1)
    generate(model, token_ids(5), 40)  # on a busy machine most come late, and count as demands
    assert first_layer_prefetches(model) > 0
    weights = model.predictor._core.state["weights"]
    learned = weights[:3].any(axis=(1, 2)).tolist()
    assert learned == [True, True, False], "of the horizon from the embedding, and one more"


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_first_moe_layers_behind_a_dense_layer_are_foreseen(predicting, monkeypatch, family):
    model = predicting(family, CacheOptions("50%"))
    model.expert_cache.set_horizon(2)
    experts = [module for module in model.modules() if isinstance(module, StreamedExperts)]
    assert experts[0] is model.model.layers[1].mlp.experts, "MoE layer 0 is layer 1 of the model"
    predictor = model.predictor
    foresee, foresee_token = predictor.foresee, predictor.foresee_token
    foreseen, routed = [], ([], [])

    def note_foreseen(embeddings, max_distance):
        foreseen.append(foresee_token(embeddings, max_distance))
        return foreseen[-1]

    monkeypatch.setattr(predictor, "foresee_token", note_foreseen)
    # Layers foresee nothing: all that is prefetched was foreseen from the embeddings.
    monkeypatch.setattr(predictor, "foresee", lambda layer, hidden, _: foresee(layer, hidden, 0))
    with contextlib.ExitStack() as hooks:
        for module, ids in zip(experts[:2], routed, strict=True):
            note = lambda _, inputs, ids=ids: ids.append(inputs[1][0].numpy())  # noqa: E731
            hooks.callback(module.register_forward_pre_hook(note).remove)
        generate(model, token_ids(1), 200)

    def share_found(distance, layer):
        needs = np.stack(foreseen)[50:, distance - 1]
        needed = np.stack(routed[layer])[50:]
        ranked = np.argsort(-needs)[:, : needed.shape[1]]
        return (ranked[:, :, None] == needed[:, None]).any(2).mean()

    assert share_found(1, layer=0) > 1.3 * share_found(1, layer=1)
    assert share_found(2, layer=1) > 1.3 * share_found(2, layer=0)
    statistics = model.expert_cache.statistics()
    assert statistics["prefetches_used"] > 0
    assert [layer["prefetch_bytes"] > 0 for layer in statistics["layers"]] == [True, True, False]


def test_embeddings_instead_of_ids_and_prompts_are_not_foreseen(tiny_streamed, predicting):
    # Without a predictor: a prefetch is counted when it ends, which may be behind the pass.
    expected = logits(use(tiny_streamed("qwen3_moe"), CacheOptions("50%")), token_ids(3))
    model = predicting("qwen3_moe", CacheOptions("50%"))
    model.expert_cache.set_horizon(1)
    ids = token_ids(3)["input_ids"]
    embeddings = model.get_input_embeddings().weight[ids]  # without a call of the module
    with torch.no_grad():
        found = model(inputs_embeds=embeddings).logits
    assert same_bits([found], [expected])
    assert first_layer_prefetches(model) == 0
    logits(model, token_ids(30))
    assert first_layer_prefetches(model) == 0


def test_a_compiled_model_prefetches_too(predicting):
    model = predicting("qwen3_moe", CacheOptions("50%"))
    model.expert_cache.set_horizon(2)
    expected = logits(model, token_ids(4))
    model.expert_cache.reset_statistics()
    counts = model.predictor._core.state["token_counts"].copy()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        found = compiled(**token_ids(4)).logits
    assert same_bits([found], [expected])
    learned = model.predictor._core.state["num_tokens"]
    assert learned.tolist() == [8.0] * len(learned)
    assert (counts == model.predictor._core.state["token_counts"]).all()  # tokens are not seen
    # Not bytes: what is copied only once its layer waits for it counts as demanded.
    assert model.expert_cache.statistics()["prefetches_used"] > 0


def test_from_pretrained_makes_saves_and_loads_a_predictor(tiny_checkpoint, tmp_path):
    path = tiny_checkpoint("deepseek_v3")
    options = {"expert_cache": "50%", "progress": False}
    model = expertflow.from_pretrained(path, prefetch=3, **options)
    generate(model, PROMPTS, 8)
    assert model.expert_cache.statistics()["prefetch_bytes"] > 0
    model.save_predictor(tmp_path / "learned")
    other = expertflow.from_pretrained(path, prefetch="auto", **options)
    assert not other.predictor._core.state["weights"].any()
    other.load_predictor(tmp_path / "learned")
    theirs = other.predictor._core.state
    for name, array in model.predictor._core.state.items():
        assert (array == theirs[name]).all() and array.any()

    plain = expertflow.from_pretrained(path, **options)
    with pytest.raises(ValueError, match='prefetch="auto"'):
        plain.save_predictor(tmp_path / "nothing")
    for bad in (True, 0.5, 9, -1, "2"):
        with pytest.raises(ValueError, match=f"prefetch={bad!r} is unknown"):
            expertflow.from_pretrained(path, prefetch=bad, **options)
    same_sizes = expertflow.from_pretrained(tiny_checkpoint("glm4_moe"), prefetch="auto", **options)
    with pytest.raises(ValueError, match="another model"):
        same_sizes.load_predictor(tmp_path / "learned")
    half = expertflow.from_pretrained(path, prefetch="auto", dtype="bfloat16", **options)
    half.load_predictor(tmp_path / "learned")


def test_every_way_to_prefetch_gives_the_same_bits_and_tells_its_horizon(tiny_checkpoint):
    path = tiny_checkpoint("olmoe")
    models = {
        prefetch: expertflow.from_pretrained(
            path, expert_cache="50%", prefetch=prefetch, progress=False
        )
        for prefetch in (False, "auto", 1, 2)
    }
    expected = outputs(models[False])
    assert models[False].expert_cache.statistics()["prefetch_bytes"] == 0
    for prefetch in ("auto", 1, 2):
        cache = models[prefetch].expert_cache
        assert same_bits(outputs(models[prefetch]), expected)
        statistics = cache.statistics()
        assert statistics["horizon"] == cache.horizon
        assert statistics["prefetch_hits"] <= statistics["prefetches_used"]
        if prefetch == "auto":
            assert 0 <= cache.horizon <= 8  # 0: it was not found to pay
        else:
            assert cache.horizon == prefetch
            assert statistics["prefetches_used"] + statistics["prefetches_wasted"] > 0
        logits(models[prefetch], PROMPTS)
        assert cache.horizon == 0, "prompts prefetch nothing"


def test_on_demand_prefetches_nothing(predicting):
    model = predicting("qwen3_moe", CacheOptions("50%", policy="on_demand"))
    model.expert_cache.set_horizon(2)
    generate(model, PROMPTS, 5)
    assert model.expert_cache.statistics()["prefetch_bytes"] == 0


def test_a_wrong_horizon_or_need_is_refused(tiny_streamed):
    cache = use(tiny_streamed("qwen3_moe"), CacheOptions("50%")).expert_cache
    for bad in (-1, 9, 1.5, "all"):
        with pytest.raises(ValueError, match=f"horizon={bad!r} is neither"):
            cache.set_horizon(bad)
    for shape in ((8,), (2, 7), (1, 2, 8)):
        with pytest.raises(ValueError, match=r"need must be \[distances, 8\]"):
            cache.prefetch_predicted(np.zeros(shape, np.float32))
    assert cache.prefetch_predicted(np.zeros((0, 8), np.float32)) == 0


def test_set_expert_cache_keeps_the_predictor(predicting):
    model = predicting("qwen3_moe")
    model.expert_cache.set_horizon(2)
    predictor = model.predictor
    use(model, CacheOptions("50%"))
    generate(model, PROMPTS, 5)
    assert model.predictor is predictor
    assert model.expert_cache.horizon == 2
    assert model.expert_cache.statistics()["prefetch_bytes"] > 0


def test_two_threads_may_predict_with_one_model(predicting):
    batches = [token_ids(25, 8, seed=1), token_ids(3, seed=2)]
    model = predicting("qwen3_moe")
    expected = [generate(model, batch, 8) for batch in batches]
    use(model, CacheOptions("50%"))

    def run(batch):
        return [generate(model, batch, 8) for _ in range(4)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(2) as threads:
            results = list(threads.map(run, batches, timeout=120))
    finally:
        sys.setswitchinterval(interval)
    for found, right in zip(results, expected, strict=True):
        assert same_bits(found, [right] * 4)


def test_no_tokens_are_no_pass(predicting):
    model = predicting("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    no_ids = torch.empty(0, model.expert_cache.top_k, dtype=torch.int64)
    nothing = experts(torch.empty(0, 32), no_ids, torch.empty(0, model.expert_cache.top_k))
    assert nothing.shape == (0, 32)


def test_memory_of_the_predictor_is_counted(tiny_checkpoint):
    path = tiny_checkpoint("qwen3_moe")
    options = {"pool": "file", "progress": False}
    model = expertflow.from_pretrained(path, prefetch="auto", **options)
    held = sum(array.nbytes for array in model.predictor._core.state.values())
    counted = predictor_bytes(3, 8, 32, 8, VOCAB_SIZE)
    assert 0 < counted - held < 0.3 * counted
    limit = model.sizes.expert_bytes_total // 4 + model.sizes.other_bytes - counted
    expertflow.from_pretrained(path, ram_limit=limit, **options)
    expertflow.from_pretrained(path, prefetch="auto", ram_limit=limit + counted, **options)
    with pytest.raises(MemoryError):
        expertflow.from_pretrained(path, prefetch="auto", ram_limit=limit + counted - 1, **options)
