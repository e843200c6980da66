"""What prefetch.py found, as tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from prefetch_methods import ADAPTIVE, CLAIRVOYANT, DECAYED, FIXED, NO_PREFETCH, PERFECT


@dataclass(frozen=True)
class Row:
    """One method at one cache size; times are microseconds a token."""

    load: str
    cache: str
    method: str
    measured_us: float
    simulated_us: float
    wall_us: float
    hits: float
    simulated_hits: float
    mean_horizon: float
    simulated_horizon: float
    prefetch_bytes: float
    wasted_bytes: float
    machine: dict[str, Any]  # that was simulated

    @property
    def difference(self) -> float:
        """Of the measured stall from the simulated one, as a share of the latter."""
        if self.simulated_us > 0:
            return self.measured_us / self.simulated_us - 1
        return math.inf if self.measured_us > 0 else 0.0


ASKED = [NO_PREFETCH, DECAYED, *FIXED, ADAPTIVE]  # to agree with the simulator
AGREES = 0.15
HEAD = (
    "cache  method                          measured  simulated    diff      wall    hits (sim.)"
    "   horizon (sim.)  prefetch (wasted)"
)


def line(row: Row) -> str:
    return (
        f"{row.cache:>5}  {row.method:30} {row.measured_us:9.1f}  {row.simulated_us:9.1f} "
        f"{row.difference:+7.1%} {row.wall_us:9.1f}  {row.hits:6.1%} ({row.simulated_hits:5.1%})  "
        f"{row.mean_horizon:7.1f} ({row.simulated_horizon:4.1f})  "
        f"{row.prefetch_bytes / 1e6:6.1f} ({row.wasted_bytes / 1e6:.1f}) MB"
    )


def hidden(rows: dict[str, Row], perfect_names: list[str], field: str) -> float:
    """Of the stall that a perfect predictor hides, the share that adaptive prefetch hides."""
    stall = {name: getattr(row, field) for name, row in rows.items()}
    without = stall[NO_PREFETCH.name]
    possible = without - min(stall[name] for name in perfect_names)
    return (without - stall[ADAPTIVE.name]) / possible if possible > 0 else float("nan")


def summary(rows: dict[str, Row], cache: str) -> str:
    """One line of the last table."""
    fixed = min((rows[method.name] for method in FIXED), key=lambda row: row.measured_us)
    best = min((rows[method.name] for method in PERFECT), key=lambda row: row.measured_us)
    asked = [rows[method.name] for method in ASKED]
    farthest = max(asked, key=lambda row: abs(row.difference))
    num_agree = sum(abs(row.difference) <= AGREES for row in asked)
    within, over = [m.name for m in PERFECT], [m.name for m in CLAIRVOYANT]
    return (
        f"{cache:>5} {rows[NO_PREFETCH.name].measured_us:12.1f} {fixed.measured_us:10.1f} "
        f"({fixed.method[-1]}) {rows[ADAPTIVE.name].measured_us:9.1f} {best.measured_us:9.1f}   "
        f"{hidden(rows, within, 'measured_us'):5.0%} ({hidden(rows, within, 'simulated_us'):4.0%})"
        f"    {hidden(rows, over, 'measured_us'):5.0%} ({hidden(rows, over, 'simulated_us'):4.0%})"
        f"   {farthest.difference:+6.1%} ({farthest.method}), {num_agree} of {len(asked)} within "
        f"{AGREES:.0%}"
    )


def print_summary(rows: list[Row]) -> None:
    print(
        "\ncache  no prefetch  best fixed   adaptive   perfect   hidden of perfect   of clairvoyant"
        "   largest difference from the simulator\n"
        "                                                        (simulated)         (simulated)"
    )
    for load in dict.fromkeys(row.load for row in rows):
        print(load)
        for cache in dict.fromkeys(row.cache for row in rows):
            found = {row.method: row for row in rows if (row.load, row.cache) == (load, cache)}
            print(summary(found, cache))
