"""`expertflow simulate` and its Python face; the arithmetic is tested in tests/cpp/."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.cli import main
from expertflow.link_profiles import LinkProfile, link_profile
from expertflow.simulation import POLICIES, PREDICTORS, Machine, Simulation, combinations
from expertflow.traces import make_trace, save_trace

LINK = LinkProfile(bandwidth_gbps=1.0, latency_us=0.01)


def trace_of(ids, num_experts=8, predictions=None):
    ids = np.asarray(ids)
    arrays = {"expert_ids": ids, "num_experts": np.int64(num_experts)}
    arrays["sequence_offsets"] = np.array([0, len(ids)])
    return make_trace(arrays | (predictions or {}))


def skewed_trace(num_tokens=300, num_layers=3, top_k=2, num_experts=8, seed=0):
    random = np.random.default_rng(seed)
    weights = random.random((num_layers, num_experts)) ** 4
    scores = weights * random.random((num_tokens, num_layers, num_experts))
    return trace_of(np.argsort(-scores, axis=-1)[..., :top_k], num_experts)


def perfect_predictions(trace, distances=4):
    shape = (trace.num_tokens, trace.num_layers, distances, trace.top_k)
    ids, need = np.zeros(shape, np.uint8), np.zeros(shape, np.float16)
    for d in range(1, distances + 1):
        ids[:, :-d, d - 1] = trace.expert_ids[:, d:]
        need[:, :-d, d - 1] = 1
    return {"predicted_ids": ids, "predicted_need": need}


def machine(expert_cache="50%", **changes):
    return Machine(**({"expert_cache": expert_cache, "expert_bytes": 1000, "link": LINK,
                       "layer_time_us": 0.5} | changes))  # fmt: skip


def test_stall_of_a_trace_computed_by_hand():
    # Two layers of one expert: 0 and 1, then 0 again and 2. A transfer takes 1010 ns.
    trace = trace_of([[[0], [1]], [[0], [2]]], 4)
    row = Simulation(trace, machine("25%")).run("lru")
    assert row["stall_us_per_token"] == pytest.approx(3 * 1.010 / 2)
    assert row["hit_rate"] == 0.25
    assert row["demand_bytes_per_token"] == 1500
    assert row["stall_vs_on_demand"] == pytest.approx(3 / 4)


def test_recorded_predictions_do_what_the_oracle_does_inside_a_token():
    trace = skewed_trace(num_layers=6)
    predicted = trace_of(trace.expert_ids, predictions=perfect_predictions(trace))
    simulation = Simulation(predicted, machine(layer_time_us=3))
    none, recorded, oracle = (simulation.run("lru", p, 3) for p in ("none", "trace", "oracle"))
    assert oracle["stall_us_per_token"] < recorded["stall_us_per_token"]
    assert recorded["stall_us_per_token"] < 0.5 * none["stall_us_per_token"]
    assert recorded["prefetch_hit_rate"] > 0
    assert recorded["wasted_bytes_per_token"] == 0


def test_computation_that_copies_slow_down_hides_more_of_them():
    trace = skewed_trace(num_layers=6)
    stall = [
        Simulation(trace, machine(layer_time_us=0.5, copy_slowdown=slowdown)).run(
            "lru", "oracle", 2
        )
        for slowdown in (0, 0.2)
    ]
    assert 0 < stall[1]["stall_us_per_token"] < stall[0]["stall_us_per_token"]


def test_gap_closed_is_measured_between_lru_and_belady():
    simulation = Simulation(skewed_trace(), machine("50%"))
    assert simulation.run("lru")["gap_closed"] == 0
    assert simulation.run("belady")["gap_closed"] == 1
    assert 0 < simulation.run("ours")["gap_closed"] < 1
    whole = Simulation(skewed_trace(), machine("100%"))
    assert whole.run("ours")["gap_closed"] is None  # no policy evicts anything


def test_infinite_link_never_stalls():
    simulation = Simulation(skewed_trace(), machine(link=link_profile("infinite")))
    for policy, predictor in combinations(skewed_trace()):
        row = simulation.run(policy, predictor)
        assert row["stall_us_per_token"] == 0
        assert row["stall_vs_on_demand"] is None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    policy=st.sampled_from(POLICIES),
    predictor=st.sampled_from(("none", "ids", "oracle")),
    horizon=st.sampled_from((None, 0, 1, 3, 8)),
    scope=st.sampled_from(("global", "layer")),
    expert_cache=st.sampled_from((0.25, 0.5, 0.75, 1.0)),
    layer_time_us=st.sampled_from((0.0, 0.3, 2.0, 20.0)),
)
def test_every_expert_is_counted_once_and_runs_repeat(
    seed, policy, predictor, horizon, scope, expert_cache, layer_time_us
):
    trace = skewed_trace(60, seed=seed)
    setup = machine(expert_cache, cache_scope=scope, layer_time_us=layer_time_us)
    row = Simulation(trace, setup, warmup_tokens=10).run(policy, predictor, horizon)
    counted = row["plain_hit_rate"] + row["prefetch_hit_rate"] + row["late_hit_rate"]
    assert counted <= 1 + 1e-9
    assert row["hit_rate"] == pytest.approx(row["plain_hit_rate"] + row["prefetch_hit_rate"])
    assert row["wasted_bytes_per_token"] <= row["prefetch_bytes_per_token"] + 8 * 6 * 1000 / 50
    assert row["stall_us_per_token"] >= 0
    if predictor == "none":
        assert row["prefetch_bytes_per_token"] == 0
        assert row["demand_bytes_per_token"] == pytest.approx((1 - row["hit_rate"]) * 6 * 1000)
    assert row == Simulation(trace, setup, warmup_tokens=10).run(policy, predictor, horizon)


def test_refuses_what_does_not_exist():
    simulation = Simulation(skewed_trace(), machine())
    with pytest.raises(ValueError, match="policy 'fifo' is unknown"):
        simulation.run("fifo")
    with pytest.raises(ValueError, match="predictor 'gut' is unknown"):
        simulation.run("lru", "gut")
    with pytest.raises(ValueError, match="the trace holds no predictions"):
        simulation.run("lru", "trace")
    with pytest.raises(ValueError, match="horizon must be auto or 0 to 8"):
        simulation.run("lru", "oracle", 9)
    with pytest.raises(ValueError, match="smallest legal cache"):
        Simulation(skewed_trace(), machine("1%"))
    with pytest.raises(ValueError, match="leaves nothing"):
        Simulation(skewed_trace(), machine(), warmup_tokens=300)


def test_profiles_come_by_name_or_from_a_file(tmp_path):
    assert link_profile("a6000").bandwidth_gbps == 25
    file = tmp_path / "mine.json"
    file.write_text('{"bandwidth_gbps": 12.5, "latency_us": 4}')
    assert link_profile(str(file)) == LinkProfile(12.5, 4.0)
    with pytest.raises(ValueError, match="'a100' is unknown"):
        link_profile("a100")
    with pytest.raises(FileNotFoundError):
        link_profile(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold an object"),
        ('{"bandwidth_gbps": 25}', "must hold an object"),
        ('{"bandwidth_gbps": 0, "latency_us": 1}', "bandwidth_gbps is 0, not a positive number"),
        ('{"bandwidth_gbps": "25", "latency_us": 1}', "bandwidth_gbps is '25'"),
        ('{"bandwidth_gbps": 25, "latency_us": -1}', "latency_us is -1"),
        ('{"bandwidth_gbps": NaN, "latency_us": 1}', "bandwidth_gbps is nan"),
    ],
)
def test_profile_files_are_checked(tmp_path, text, message):
    file = tmp_path / "wrong.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        link_profile(str(file))
    assert str(file) in str(error.value)


@pytest.fixture
def command(tmp_path):
    path = tmp_path / "trace.npz"
    save_trace(path, skewed_trace())
    return ["simulate", "--trace", str(path), "--expert-cache", "50%", "--expert-bytes", "1MB",
            "--profile", "a6000", "--layer-time-us", "50"]  # fmt: skip


def test_command_prints_one_row_for_each_combination(command, capsys):
    options = ["--policy", "all", "--predictor", "all", "--json", "--warmup-tokens", "20"]
    assert main([*command, *options]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"lru", "belady", "ours"} <= {row["policy"] for row in rows}
    predictors = [name for name in PREDICTORS if name != "trace"]  # it recorded none
    assert len(rows) == 1 + (len(POLICIES) - 1) * len(predictors)
    for row in rows:
        assert row["horizon"] == (0 if row["predictor"] == "none" else "auto")
        for name in ("hit_rate", "stall_us_per_token", "stall_vs_on_demand", "gap_closed",
                     "demand_bytes_per_token", "prefetch_bytes_per_token",
                     "wasted_bytes_per_token"):  # fmt: skip
            assert math.isfinite(row[name])


def test_command_prints_a_table(command, capsys):
    assert main([*command, "--predictor", "oracle", "--horizon", "2", "--max-tokens", "50"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["policy", "predictor"]
    assert row.split()[:3] == ["ours", "oracle", "2"]


def test_command_names_the_culprit(command, capsys):
    assert main([*command[:2], "none.npz", *command[3:]]) == 1
    assert "none.npz" in capsys.readouterr().err
    assert main([*command, "--profile", "a100"]) == 1
    assert "a100" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--horizon", "9"])
    assert "9 is not auto or 0 to 8" in capsys.readouterr().err
