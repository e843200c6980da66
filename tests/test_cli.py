"""The command line as a user meets it: standard output, standard error, exit status."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expertflow import cli
from expertflow.demo import DEMO_MODEL

ROOT = Path(__file__).parent.parent
PROMPT = "KING HENRY:\n"
GENERATE = ["generate", str(DEMO_MODEL), "--prompt", PROMPT, "--max-new-tokens", "12"]
JSON_KEYS = {
    "text",
    "prompt_tokens",
    "new_tokens",
    "tokens_per_second",
    "hit_rate",
    "stall_ms_per_token",
    "demand_bytes",
    "prefetch_bytes",
    "wasted_prefetch_bytes",
    "prefetch_hits",
    "horizon",
    "routes",
    "changed_routes",
    "expert_cache_bytes",
    "expert_pool_bytes",
    "policy",
    "device",
}


def run_json(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    assert cli.main([*GENERATE, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_text_goes_to_stdout_and_figures_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    expected = run_json(capsys)["text"]
    assert cli.main(GENERATE) == 0
    captured = capsys.readouterr()
    assert captured.out == expected + "\n"
    assert "hit rate" in captured.err
    assert "stall/token" in captured.err


def test_prefetch_changes_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    plain = run_json(capsys, "--prefetch", "off")
    assert (plain["horizon"], plain["prefetch_bytes"]) == (0, 0)
    fixed = run_json(capsys, "--prefetch", "2")
    assert fixed["horizon"] == 2
    assert fixed["prefetch_bytes"] > 0
    adaptive = run_json(capsys, "--prefetch", "auto")
    assert 0 <= adaptive["horizon"] <= 8
    assert plain["text"] == fixed["text"] == adaptive["text"]


@pytest.mark.parametrize("bad", ["0", "9", "-1", "on", "1.5"])
def test_bad_prefetch_is_refused(capsys: pytest.CaptureFixture[str], bad: str) -> None:
    with pytest.raises(SystemExit):
        cli.main([*GENERATE, f"--prefetch={bad}"])
    assert f"{bad} is not auto, off or 1 to 8" in capsys.readouterr().err


def test_json_has_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "--expert-cache", "50%", "--policy", "lru")
    assert set(report) == JSON_KEYS
    assert report["new_tokens"] == 12
    assert report["policy"] == "lru"
    assert report["device"] == "cpu"
    assert report["expert_cache_bytes"] * 2 == report["expert_pool_bytes"]
    assert 0 < report["hit_rate"] < 1
    assert report["demand_bytes"] > 0


@pytest.mark.parametrize("pool", ["ram", "file"])
def test_text_does_not_depend_on_cache_and_pool(
    capsys: pytest.CaptureFixture[str], pool: str
) -> None:
    texts = {
        run_json(capsys, "--expert-cache", size, "--pool", pool)["text"] for size in ("2%", "100%")
    }
    assert len(texts) == 1


def test_on_demand_keeps_nothing_and_gives_the_same_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = run_json(capsys, "--compare-on-demand")
    assert report["on_demand"]["policy"] == "on_demand"
    assert report["on_demand"]["hit_rate"] == 0
    assert report["on_demand"]["text"] == report["text"]
    assert report["on_demand"]["demand_bytes"] > report["demand_bytes"]


def test_seed_decides_what_is_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (
        run_json(capsys, "--temperature", "1", "--seed", seed)["text"] for seed in "113"
    )
    assert first == again != other


def test_prompt_is_read_from_stdin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text(PROMPT)
    expected = run_json(capsys)
    with (tmp_path / "prompt").open() as prompt:
        monkeypatch.setattr(sys, "stdin", prompt)
        arguments = ["-" if argument == PROMPT else argument for argument in GENERATE]
        assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected["text"]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["generate", "/no/such/model", "--prompt", "x"], "/no/such/model"),
        (["info", "/no/such/model"], "/no/such/model"),
        ([*GENERATE, "--expert-cache", "lots"], "lots"),
        ([*GENERATE, "--expert-cache", "1"], "smallest legal cache"),
        ([*GENERATE, "--device", "cuda:99"], "cuda:99"),
        ([*GENERATE, "--dtype", "float8"], "float8"),
        ([*GENERATE, "--routing-budget", "0.1"], "--routing biased"),
        ([*GENERATE, "--ram-limit", "1MiB"], "available"),
        ([*GENERATE[:3], "", "--max-new-tokens", "3"], "prompt is empty"),
    ],
)
def test_errors_are_one_line_that_names_the_culprit(
    capsys: pytest.CaptureFixture[str], arguments: list[str], culprit: str
) -> None:
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("expertflow: error: ")
    assert culprit in captured.err


def test_biased_routing_stays_within_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    exact = run_json(capsys)
    assert (exact["routes"], exact["changed_routes"]) == (0, 0)
    none = run_json(capsys, "--routing", "biased", "--routing-budget", "0")
    assert none["text"] == exact["text"]
    assert none["routes"] > none["changed_routes"] == 0
    biased = run_json(capsys, "--routing", "biased", "--routing-budget", "0.2")
    assert 0 < biased["changed_routes"] <= 0.2 * biased["routes"]
    assert cli.main([*GENERATE, "--routing", "biased"]) == 0
    assert "changed routes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [["--max-new-tokens", "0"], ["--policy", "best"], ["--routing-budget", "2"]],
)
def test_unknown_values_are_usage_errors(
    capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*GENERATE, *option])
    assert caught.value.code == 2
    assert option[0] in capsys.readouterr().err


def test_info_agrees_with_the_cache_it_describes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(DEMO_MODEL), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["num_moe_layers"], info["num_experts"], info["top_k"]) == (8, 16, 2)
    smallest = info["smallest_cache_bytes"]
    assert run_json(capsys, "--expert-cache", str(smallest))["expert_cache_bytes"] == smallest
    assert cli.main([*GENERATE, "--expert-cache", str(smallest - 1)]) == 1
    assert str(smallest) in capsys.readouterr().err
    assert cli.main(["info", str(DEMO_MODEL)]) == 0
    assert f"{info['expert_bytes']} (" in capsys.readouterr().out


def test_demo_is_bit_identical(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "ROMEO:" in out
    assert "on demand" in out
    assert "Tokens and logits are bit-identical" in out


def test_interrupt_ends_cleanly() -> None:
    endless = ["generate", str(DEMO_MODEL), "--prompt", PROMPT, "--max-new-tokens", "900"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "expertflow", *endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()  # it is generating
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors


def test_interrupt_while_torch_is_imported_ends_cleanly(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    script = "import sys, expertflow_script; sys.exit(expertflow_script.main())"
    process = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 130
    assert process.stderr == "\nexpertflow: interrupted\n"
