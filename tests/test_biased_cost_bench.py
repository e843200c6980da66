"""bench/cuda/biased_cost.py, small and on the CPU."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "bench" / "cuda" / "biased_cost.py"


def test_every_routing_is_measured():
    options = ["--device", "cpu", "--tokens", "12", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options], check=True, capture_output=True, text=True
    )
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert {"exact", "biased, budget 0", "biased, budget 5 %"} <= set(rows)
