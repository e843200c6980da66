"""bench/paper/layer_times.py, small and on the CPU."""

from pathlib import Path

import pytest

TINY_DEEPSEEK = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "vocab_size": 64,
}


@pytest.fixture
def layer_times(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench" / "paper"))
    import layer_times

    return layer_times


def test_layer_times_are_measured_and_kept(layer_times, tmp_path):
    sizes = layer_times.DEEPSEEK_V2_LITE | TINY_DEEPSEEK
    times = layer_times.measure(
        sizes, "cpu", num_layers=3, context_tokens=16, tokens=8, copy_bytes=1 << 20
    )
    assert times.is_measured and set(times.layer_us) == set(layer_times.IMPLEMENTATIONS)
    assert times.default in times.layer_us
    file = tmp_path / "times.json"
    for name in ("a6000", "h200", "h200"):
        layer_times.save_layer_times(file, name, times)
    assert layer_times.load_layer_times(file) == {"a6000": times, "h200": times}
    assert times.date in layer_times.describe(times)


def test_bytes_of_a_layer_are_those_that_a_token_reads(layer_times):
    model = layer_times.build_model(layer_times.DEEPSEEK_V2_LITE | TINY_DEEPSEEK, 1, "cpu")
    layer = model.model.layers[0]
    experts = 3 * 64 * 32 * 2 * 8
    weights = sum(p.nbytes for p in layer.parameters())
    found, at_half_the_context = (layer_times.layer_bytes(model, tokens) for tokens in (16, 8))
    assert found > at_half_the_context
    assert 2 * at_half_the_context - found == weights - experts * 6 // 8  # 2 of 8 are routed to


def test_committed_layer_times_can_be_read(layer_times):
    assert layer_times.load_layer_times()["h200"].eager_us > 0
