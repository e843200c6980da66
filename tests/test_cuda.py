"""The CUDA backend under transformers: exact, as good as transformers, and clear when it fails."""

import threading

import pytest
import torch
from streamed import SMALLEST, CacheOptions, generate, logits, same_bits, token_ids, use
from tiny_models import FAMILIES, FAMILY_CONFIGS, make_checkpoint
from transformers import AutoModelForCausalLM

import expertflow
from expertflow import ExpertCache, MoELayer, TransferError, ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA device here"
)
CUDA = torch.device("cuda", 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHES = [
    CacheOptions(size, policy, scope)
    for size, policy, scope in (
        ("smallest", "lru", "global"),
        ("smallest", "on_demand", "layer"),
        ("smallest+1", "decayed_frequency", "global"),
        ("25%", "two_level_lru", "global"),
        ("50%", "decayed_frequency", "layer"),
        ("all-1", "lru", "layer"),
        ("all", "on_demand", "global"),
    )
]


def on_gpu(batch):
    return {name: tensor.to(CUDA) for name, tensor in batch.items()}


PROMPTS = token_ids(23, 9, 1)  # more tokens than the decode kernels take
PROMPT = token_ids(11, seed=1)


def outputs(model):
    prompts, prompt = on_gpu(PROMPTS), on_gpu(PROMPT)
    steps = generate(model, prompt, 6, output_logits=True, return_dict_in_generate=True)
    return [
        logits(model, prompts),
        logits(model, prompt),
        generate(model, prompts, 5),
        *steps.logits,
    ]


@pytest.fixture(scope="module")
def aligned_checkpoint(tmp_path_factory):
    """A checkpoint with sizes that kernels and grouped products take."""
    made = {}

    def make(family):
        if family not in made:
            sizes = {"moe_intermediate_size": 24, "intermediate_size": 48}
            sizes = {name: size for name, size in sizes.items() if name in FAMILY_CONFIGS[family]}
            path = tmp_path_factory.mktemp(family)
            made[family] = make_checkpoint(family, path, max_shard_size="100KB", **sizes)
        return made[family]

    return make


def load(path, dtype=torch.float32, **options):
    options = {"expert_cache": "100%", "device": "cuda", "progress": False} | options
    return expertflow.from_pretrained(path, dtype=dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_the_cache(aligned_checkpoint, family, dtype):
    expected = None
    for pool in ("ram", "file"):
        model = load(aligned_checkpoint(family), dtype, pool=pool)
        assert model.expert_cache.mlp_hidden == 32
        if expected is None:
            expected = outputs(model)
            assert model.expert_cache.statistics()["misses"] == 0
        for options in CACHES:
            assert same_bits(outputs(use(model, options)), expected), (pool, options)
            assert model.expert_cache.statistics()["misses"] > 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_bits_do_not_depend_on_prefetches(aligned_checkpoint, family):
    model = use(load(aligned_checkpoint(family), torch.bfloat16), CacheOptions("50%"))
    cache = model.expert_cache
    expected = outputs(model)
    generator = torch.Generator().manual_seed(0)
    compute = expertflow.experts.compute_experts

    def with_prefetches(cache_, layer, *arguments, **keywords):
        def prefetch():
            for distance in (1, 2):
                ids = torch.randint(cache.num_experts, (2,), generator=generator)
                cache.prefetch((layer + distance) % cache.num_layers, ids, distance)

        return compute(cache_, layer, *arguments, **keywords | {"on_planned": prefetch})

    expertflow.experts.compute_experts = with_prefetches
    try:
        for _ in range(5):
            assert same_bits(outputs(model), expected)
    finally:
        expertflow.experts.compute_experts = compute
    assert cache.statistics()["prefetch_bytes"] > 0


@pytest.mark.parametrize("prefetch", ["auto", 1, 2])
def test_bits_do_not_depend_on_the_predictor(aligned_checkpoint, prefetch):
    path = aligned_checkpoint("qwen3_moe")
    expected = outputs(load(path, torch.bfloat16))
    model = use(load(path, torch.bfloat16, prefetch=prefetch), CacheOptions("50%"))
    assert same_bits(outputs(model), expected)
    statistics = model.expert_cache.statistics()
    assert statistics["horizon"] == model.expert_cache.horizon
    if prefetch == "auto":
        assert model.expert_cache.bandwidth_bytes_per_second > 0
        assert 0 <= statistics["horizon"] <= 8  # whether it pays depends on timing
    else:
        assert statistics["horizon"] == prefetch
        assert statistics["prefetch_bytes"] > 0


@pytest.mark.parametrize("pin_memory", [True, False, None])
def test_memory_may_be_pinned_or_not(aligned_checkpoint, pin_memory):
    model = use(load(aligned_checkpoint("olmoe"), pin_memory=pin_memory), SMALLEST)
    assert torch.isfinite(logits(model, on_gpu(PROMPT))).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits_are_those_of_transformers(tiny_checkpoint, family):
    path = tiny_checkpoint(family)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(CUDA)
    ours = use(load(path), SMALLEST)
    for batch in (token_ids(60, 13, 1), token_ids(1), token_ids(300, seed=1), token_ids(7)):
        expected = logits(theirs, on_gpu(batch))
        error = (logits(ours, on_gpu(batch)) - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_error_is_no_larger_than_that_of_transformers(aligned_checkpoint, family):
    path = aligned_checkpoint(family)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(CUDA)
    ours = use(load(path, torch.bfloat16), SMALLEST)
    batches = [token_ids(200, seed=seed) for seed in range(4)]
    exact = [logits(reference, batch).double() for batch in batches]

    def error(model):
        found = (logits(model, on_gpu(batch)).cpu().double() for batch in batches)
        return float(sum((a - b).abs().mean() for a, b in zip(found, exact, strict=True)))

    assert error(ours) <= error(plain) * 1.02


def test_large_batches_are_one_product(aligned_checkpoint):
    """Many tokens in bf16 go through torch's grouped product, where there is one."""
    model = load(aligned_checkpoint("qwen3_moe"), torch.bfloat16)
    expected = torch.cuda.get_device_capability(CUDA)[0] in (9, 10)
    assert expertflow.grouped.can_group(model.expert_cache) == expected


def test_a_layer_of_ones_own():
    torch.manual_seed(0)
    tensors = {
        "gate_up_proj": torch.randn(2, 8, 48, 32),
        "down_proj": torch.randn(2, 8, 32, 24),
    }
    router = torch.randn(8, 32)
    hidden = torch.randn(40, 32)
    on_cpu = MoELayer(router, ExpertCache.from_tensors(tensors, 2, num_slots=16), 1)
    cache = ExpertCache.from_tensors(tensors, 2, num_slots=5, device=CUDA, mlp_hidden=32)
    layer = MoELayer(router.to(CUDA), cache, 1)
    for tokens in (hidden, hidden[:16], hidden[:1]):
        ours, theirs = layer(tokens.to(CUDA)).cpu(), on_cpu(tokens)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    with pytest.raises(ValueError, match="SiLU"):
        MoELayer(router.to(CUDA), cache, 1, activation=torch.nn.functional.gelu)


def test_compute_slots_can_be_captured():
    torch.manual_seed(0)
    tensors = {
        "gate_up_proj": torch.randn(1, 8, 48, 32),
        "down_proj": torch.randn(1, 8, 32, 24),
    }
    cache = ExpertCache.from_tensors(tensors, 2, num_slots=8, device=CUDA, mlp_hidden=32)
    ids = torch.tensor([[3, 5], [5, 0]])
    hidden, weights = torch.randn(2, 32, device=CUDA), torch.rand(2, 2, device=CUDA)
    ops.plan(cache.handle, ids.to(CUDA), 0)
    expected = ops.compute(cache.handle, hidden, weights)
    output = torch.empty_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.compute_slots(cache.handle, ids, hidden, weights, output)
    graph.replay()
    assert torch.equal(output, expected)
    with pytest.raises(ValueError, match="slot 8 does not exist"):
        ops.compute_slots(cache.handle, ids + 3, hidden, weights, output)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weighted_sum_adds_in_the_order_of_the_places(weights_dtype):
    torch.manual_seed(0)
    partial = torch.randn(300 * 6, 136, device=CUDA, dtype=torch.bfloat16)
    weights = torch.rand(300, 6, device=CUDA).to(weights_dtype)
    weighted = partial.view(300, 6, 136) * weights.unsqueeze(-1)
    expected = torch.zeros(300, 136, device=CUDA)
    for place in range(6):
        expected += weighted[:, place]
    expected = expected.to(weights_dtype).to(torch.bfloat16)
    assert same_bits(ops.weighted_sum(partial, weights), expected)


def test_upload_takes_more_than_a_launch_can_carry():
    values = list(range(-1000, 1500))
    assert ops.upload(values, CUDA).tolist() == values
    with pytest.raises(ValueError, match="int32"):
        torch.ops.expertflow.upload(torch.zeros(3), torch.empty(3, device=CUDA))


def test_a_stream_of_the_callers(aligned_checkpoint):
    model = use(load(aligned_checkpoint("mixtral")), SMALLEST)
    expected = outputs(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = outputs(model)
    stream.synchronize()
    assert same_bits(found, expected)


def test_two_models_on_two_threads(aligned_checkpoint):
    models = [
        use(load(aligned_checkpoint(family), torch.bfloat16), SMALLEST)
        for family in ("qwen2_moe", "gpt_oss")
    ]
    expected = [outputs(model) for model in models]
    found = [[], []]

    def run(index):
        for _ in range(4):
            found[index].append(outputs(models[index]))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(found[index]) == 4
        assert all(same_bits(one, expected[index]) for one in found[index])


def test_a_cache_that_does_not_fit_says_what_would(aligned_checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50_000, 1 << 30))
    with pytest.raises(MemoryError, match="What would fit"):
        load(aligned_checkpoint("qwen3_moe"))


def test_a_model_keeps_its_cache_if_a_new_one_cannot_be_had(aligned_checkpoint, monkeypatch):
    model = use(load(aligned_checkpoint("qwen3_moe")), CacheOptions("50%"))
    expected = outputs(model)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1 << 30))
        with pytest.raises(MemoryError, match="free"):
            model.set_expert_cache("100%")
    assert same_bits(outputs(model), expected)


def test_a_checkpoint_that_is_cut_is_an_error(tmp_path):
    path = make_checkpoint("olmoe", tmp_path)
    model = use(load(path, pool="file"), SMALLEST)
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(TransferError, match="MoE layer"):
        logits(model, on_gpu(PROMPT))


def test_a_compiled_model_is_the_same(aligned_checkpoint):
    model = use(load(aligned_checkpoint("qwen3_moe")), CacheOptions("50%"))
    batch = on_gpu(PROMPT)
    expected = logits(model, batch)
    compiled = torch.compile(model, mode="reduce-overhead")
    for _ in range(4):
        found = logits(compiled, batch)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
