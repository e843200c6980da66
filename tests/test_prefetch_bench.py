"""bench/cuda/prefetch.py, small and on the CPU backend."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from expertflow.traces import make_trace, save_trace

SCRIPT = Path(__file__).parents[1] / "bench" / "cuda" / "prefetch.py"


def predicted_trace(num_tokens=40, num_layers=4, num_experts=8, top_k=2):
    """Skewed routing, and predictions that are right every second time."""
    random = np.random.default_rng(0)
    popularity = random.random((num_layers, num_experts)) ** 3
    scores = popularity * random.random((num_tokens, num_layers, num_experts))
    ids = np.argsort(-scores, axis=-1)[..., :top_k]
    predicted = random.integers(0, num_experts, (num_tokens, num_layers, 8, top_k))
    predicted[..., 1] = (predicted[..., 0] + 1) % num_experts
    need = np.zeros(predicted.shape, np.float16)
    for distance in range(1, num_layers):
        predicted[::2, :-distance, distance - 1] = ids[::2, distance:]
        need[:, :-distance, distance - 1] = 0.5
    return make_trace(
        {
            "expert_ids": ids,
            "num_experts": np.int64(num_experts),
            "sequence_offsets": np.array([0, num_tokens]),
            "predicted_ids": predicted,
            "predicted_need": need,
        }
    )


@pytest.fixture(scope="module")
def prefetch_rows(tmp_path_factory):
    """What bench/cuda/prefetch.py finds on the CPU backend, by cache and method."""
    folder = tmp_path_factory.mktemp("prefetch")
    save_trace(folder / "trace.npz", predicted_trace())
    command = [sys.executable, SCRIPT, "--trace", folder / "trace.npz"]
    options = "--device cpu --warmup 10 --tokens 30 --expert-kib 64 --layer-us 100 --shares .25 .5"
    out = folder / "rows.json"
    subprocess.run([*command, *options.split(), "--json", out], check=True, capture_output=True)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return {(row["cache"], row["method"]): row for row in rows}


def test_every_method_is_measured_beside_the_simulator(prefetch_rows):
    methods = {method for _, method in prefetch_rows}
    expected = {"on demand", "no prefetch", "adaptive", "perfect, adaptive"}
    assert methods >= expected | {f"fixed step {step}" for step in (1, 2, 3, 4)}
    for cache in ("25%", "50%"):
        assert {m for c, m in prefetch_rows if c == cache} >= methods - {"on demand"}


def test_caches_hit_as_the_simulator_does(prefetch_rows):
    for (_, method), row in prefetch_rows.items():
        if "prefetch" in method or method == "on demand":
            assert row["hits"] == pytest.approx(row["simulated_hits"])


def test_predictions_reach_the_caches_and_the_simulator(prefetch_rows):
    for cache in ("25%", "50%"):
        without = prefetch_rows[cache, "no prefetch"]
        assert without["prefetch_bytes"] == 0
        for method in ("fixed step 1", "perfect, fixed step 8", "clairvoyant, fixed step 8"):
            assert prefetch_rows[cache, method]["prefetch_bytes"] > 0
        clairvoyant = prefetch_rows[cache, "clairvoyant, fixed step 8"]
        assert clairvoyant["simulated_hits"] > without["simulated_hits"]
