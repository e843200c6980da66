"""The adaptive horizon against no prefetch and against fixed horizons, simulated, in random cells.

    python bench/paper/horizons.py TRACE.npz [TRACE.npz ...] [--samples 40] [--seed 1]

A cell is a trace and its predictor (recorded, or from ids; sometimes the perfect one), a cache of
12.5 to 75 %, a link, 40 to 1912 us a layer, a cache scope and an eviction policy; all methods of a
cell share these. Experts are of DeepSeek-V2-Lite's size. Marked are cells in which `auto` stalls
longer than without prefetch, or by more than 2 % of the on-demand stall longer than the best of the
fixed horizons. Stalls are shares of the on-demand stall. Constants are fitted on first halves.
"""

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from stall_bench import EXPERT_BYTES, FIXED_STEPS, load_part, own_predictor, trace_options

from expertflow.link_profiles import LINK_PROFILES
from expertflow.simulation import Machine, Simulation
from expertflow.traces import Trace

PERFECT_SHARE = 0.25  # of the cells
ALLOWED_ABOVE_FIXED = 0.02


@dataclass(frozen=True)
class Cell:
    trace: str
    predictor: str
    expert_cache: float
    link: str
    layer_time_us: int
    cache_scope: str
    policy: str

    @staticmethod
    def draw(rng: random.Random, traces: dict[str, Trace]) -> "Cell":
        name = rng.choice(sorted(traces))
        return Cell(
            trace=name,
            predictor="oracle" if rng.random() < PERFECT_SHARE else own_predictor(traces[name]),
            expert_cache=rng.choice((0.125, 0.25, 0.5, 0.75)),
            link=rng.choice(("a6000", "a6000-paper", "h200")),
            layer_time_us=rng.choice((40, 100, 216, 500, 1000, 1912)),
            cache_scope=rng.choice(("global", "layer")),
            policy=rng.choice(("decayed_frequency", "predicted_need")),
        )

    def run(self, trace: Trace, warmup_tokens: int) -> dict[str, float]:
        """The stall of each method."""
        machine = Machine(
            self.expert_cache,
            EXPERT_BYTES,
            LINK_PROFILES[self.link],
            self.layer_time_us,
            self.cache_scope,
        )
        simulation = Simulation(trace, machine, warmup_tokens=warmup_tokens)
        stalls = {"none": simulation.run(self.policy)}
        for step in FIXED_STEPS:
            stalls[str(step)] = simulation.run(self.policy, self.predictor, step)
        stalls["auto"] = simulation.run(self.policy, self.predictor)
        return {method: row["stall_vs_on_demand"] for method, row in stalls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[trace_options(max_tokens=4000, warmup_tokens=1000)],
    )
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the cells there too")
    options = parser.parse_args()

    if options.samples < 1:
        parser.error("--samples must be at least 1")
    traces = {path.stem: load_part(path, options) for path in options.traces}
    rng = random.Random(options.seed)
    cells = []
    for _ in range(options.samples):
        cell = Cell.draw(rng, traces)
        stalls = cell.run(traces[cell.trace], options.warmup_tokens)
        above_none = stalls["auto"] - stalls["none"]
        above_fixed = stalls["auto"] - min(stalls[str(step)] for step in FIXED_STEPS)
        cells.append(
            asdict(cell) | {"stall": stalls, "above_none": above_none, "above_fixed": above_fixed}
        )
        mark = " ABOVE NONE" if above_none > 0 else ""
        mark += " ABOVE FIXED" if above_fixed > ALLOWED_ABOVE_FIXED else ""
        print(
            f"{cell.trace[:12]:12} {cell.predictor:6} {cell.expert_cache:5.1%} {cell.link:11} "
            f"{cell.layer_time_us:5} us {cell.cache_scope:6} {cell.policy[:10]:10} "
            + " ".join(f"{method}: {stall:.4%}" for method, stall in stalls.items())
            + mark,
            flush=True,
        )
    num_above = sum(cell["above_none"] > 0 for cell in cells)
    print(
        f"{len(cells)} cells; above no prefetch in {num_above}, by at most "
        f"{max(cell['above_none'] for cell in cells):.4%}; above the best fixed horizon by at most "
        f"{max(cell['above_fixed'] for cell in cells):.4%} of on-demand"
    )
    if options.json:
        options.json.write_text(json.dumps(cells, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
