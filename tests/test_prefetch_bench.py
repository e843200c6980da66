"""bench/cuda/prefetch.py, small and on the CPU backend."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from expertflow import ops
from expertflow.link_profiles import LinkProfile
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
    first_ids, first_need = predicted[:, 0].copy(), np.zeros_like(need[:, 0])
    first_ids[::2, :num_layers], first_need[:, :num_layers] = ids[::2], 0.5
    return make_trace(
        {
            "expert_ids": ids,
            "num_experts": np.int64(num_experts),
            "sequence_offsets": np.array([0, num_tokens]),
            "predicted_ids": predicted,
            "predicted_need": need,
            "first_predicted_ids": first_ids,
            "first_predicted_need": first_need,
        }
    )


@pytest.fixture
def bench(monkeypatch):
    """The parts of the benchmark, as modules."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import foreseen
    import measured_run
    import prefetch_costs
    import prefetch_methods

    return SimpleNamespace(
        foreseen=foreseen,
        run=measured_run,
        costs=prefetch_costs,
        methods=prefetch_methods,
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


def test_a_perfect_predictor_foresees_also_first_layers(prefetch_rows):
    for cache in ("25%", "50%"):
        assert prefetch_rows[cache, "no prefetch"]["simulated_hits"] < 1
        assert prefetch_rows[cache, "perfect, fixed step 8"]["simulated_hits"] == 1


def test_what_is_foreseen_where_a_token_begins(bench):
    trace = predicted_trace()
    perfect = bench.foreseen.perfect(trace).first_need
    assert perfect.shape == (40, 8, 8)
    assert (perfect[:, 4:] == 0).all()  # there are no such layers
    assert (perfect[:, :4].sum(-1) == trace.top_k).all()
    assert (np.take_along_axis(perfect[:, :4], trace.expert_ids.astype(np.int64), -1) == 1).all()
    recorded = bench.foreseen.recorded(trace).first_need
    first_ids = trace.first_predicted_ids.astype(np.int64)
    assert (np.take_along_axis(recorded, first_ids, -1)[:, :4] == 0.5).all()
    assert (recorded[:, :4].sum(-1) == 1).all()
    assert bench.foreseen.clairvoyant(trace).first_need is None  # it knew before


class SeenCache:
    """Notes what is asked of it; `horizon` is what was used, not what may be foreseen."""

    num_layers, num_experts, horizon = 2, 8, 1

    def __init__(self):
        self.seen = []

    def set_horizon(self, horizon):
        self.seen.append(("horizon", horizon))

    def begin_token(self, num_tokens):
        self.seen.append(("token", num_tokens))
        return 2

    def begin_prefetch(self):
        return 3

    def prefetch_predicted(self, need):
        self.seen.append(need.shape)


def test_methods_prefetch_for_a_token_before_its_first_layer(bench):
    trace = predicted_trace()
    foreseen = {"recorded": bench.foreseen.recorded(trace)}
    foreseen["clairvoyant"] = bench.foreseen.clairvoyant(trace)
    cache = SeenCache()
    prefetcher = bench.methods.Prefetcher(cache, bench.methods.FIXED[1], foreseen)
    prefetcher.begin_token(0)
    assert cache.seen == [("horizon", 2), ("token", 1), (2, 8)]
    assert prefetcher.prefetch(0, 0) == 1
    assert cache.seen[-1] == (3, 8)
    cache = SeenCache()
    bench.methods.Prefetcher(cache, bench.methods.NO_PREFETCH, foreseen).begin_token(0)
    assert cache.seen == []
    clairvoyant = bench.methods.CLAIRVOYANT[0]
    bench.methods.Prefetcher(cache, clairvoyant, foreseen).begin_token(0)
    assert cache.seen == [("token", 1)]


class TimedLoad:
    """Marks are microseconds of its own clock."""

    def __init__(self, cache):
        self.cache, self.now_us = cache, 0.0

    def begin(self): ...
    def end_token(self): ...
    def synchronize(self): ...

    def mark(self):
        return self.now_us

    def elapsed_us(self, begin, end):
        return end - begin

    def plan(self, cache, token, layer):
        self.now_us += 60 if token != 4 else 10_000  # held up, which the medians do not see
        is_missing = layer == 1 and token in (3, 5)
        if is_missing:
            self.cache.stall_us += 300
        self.now_us += 310 if is_missing else 0
        return torch.tensor([[0, 0, ops.MISS if is_missing else ops.HIT, 0, -1, 1]])

    def compute(self, cache, layer):
        self.now_us += 40


class StalledCache(SeenCache):
    stall_us = 0.0

    def statistics(self):
        return {
            "stall_us": self.stall_us,
            "layers": [{"stall_us": us} for us in (0, self.stall_us)],
        }

    def reset_statistics(self):
        self.stall_us = 0.0


def test_a_run_tells_a_layers_time_without_stalls_and_pauses(bench):
    cache = StalledCache()
    prefetcher = bench.methods.Prefetcher(cache, bench.methods.NO_PREFETCH, {})
    run = bench.run.run(TimedLoad(cache), cache, prefetcher, warmup=2, tokens=7)
    assert run.layer_us == 100
    assert run.planned_us == 40
    assert run.miss_us == 10
    assert run.counts["stall_us"] == 2 * 300  # of tokens 3 and 5
    assert run.tokens == 7


def test_the_simulated_machine_is_the_measured_one_less_what_copies_slow_down(bench):
    # 20 layers of 100 us; two demands and a prefetch of 10 MB took 3 * 1000 us + 4 copies, of which
    # 2000 us were stalls: half of the computing was beside copies, which make it a fifth longer.
    load = SimpleNamespace(expert_bytes=10_000_000, demand_chunk_bytes=24 << 20)
    counts = {"stall_us": 2000.0, "demand_bytes": 20_000_000, "prefetch_bytes": 10_000_000}
    counts |= {"misses": 0, "late_hits": 0}
    run = bench.run.Run(10, 0.0, 100.0, 30.0, None, counts, 0.0)
    costs = bench.costs.Costs(LinkProfile(10.0, 0.0), 0.2, 45.0, 8.0, {})
    machine = costs.machine(run, load, num_slots=7, num_layers=2)
    assert machine.layer_time_us == pytest.approx(100 * (1 - 0.5 / 6))
    assert machine.expert_share == pytest.approx(0.3)
    assert (machine.expert_cache, machine.copy_slowdown) == (70_000_000, 0.2)
    assert machine.miss_us == 8
    all_miss = bench.run.Run(
        10, 0.0, 100.0, 30.0, None, counts | {"misses": 30, "late_hits": 10}, 0.0
    )
    assert costs.machine(all_miss, load, 7, 2).layer_time_us == pytest.approx(
        (100 - 2 * 8) * (1 - 0.5 / 6)
    )
    nothing_hit = bench.run.Run(10, 0.0, 100.0, None, None, counts, 0.0)
    assert costs.machine(nothing_hit, load, 7, 2).expert_share == pytest.approx(0.45)
    slow = bench.costs.Costs(LinkProfile(10.0, 250.0), 0.2, 45.0, 8.0, {})
    copies = 2 + 2  # of 5 MiB and the rest
    share = 0.5 + copies * 250 / 2000
    assert slow.machine(run, load, 7, 2).layer_time_us == pytest.approx(100 * (1 - share / 6))
