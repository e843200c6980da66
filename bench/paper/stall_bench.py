"""The paper's result, simulated: stall per token as a share of the on-demand baseline.

    python bench/paper/stall_bench.py TRACE.npz [TRACE.npz ...] [--part second] [--out DIR]

DeepSeek-V2-Lite's sizes, whatever the trace: experts of 17.3 MB, and of all experts the share that
5 to 25 GB are of DeepSeek-V2-Lite's 28.8 GB. A trace that holds recorded predictions is run with
them, another with the predictor that sees ids only. Constants are fitted on first
halves, so results are those of second ones. The layer times are those of layer_times.json. Every
cell of cache size, link and layer time is shown, also those that physics forbids:

- bound: the perfect predictor's transfers, as a share of the compute time; "link" where they do not
  fit into it
- fixed step: the best of 1, 2, 4 and 8 layers in that cell, named in the column step, with LRU
- perfect: the trace itself as predictor, with the adaptive or the longest horizon
- claim: where the perfect predictor stalls at most 0.05 % of on-demand, ours shall stall at most
  0.1 %

Writes cells.json, table.md and, if matplotlib is there, stall.png to --out.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from layer_times import load_layer_times

from expertflow.link_profiles import LINK_PROFILES
from expertflow.simulation import MAX_HORIZON, Machine, Simulation
from expertflow.traces import Trace, load_trace

# DeepSeek-V2-Lite, bf16: hidden 2048, experts of 3 x 2048 x 1408, 26 layers of 64, top-6, 2 shared.
EXPERT_BYTES = 3 * 2048 * 1408 * 2
ALL_EXPERTS_BYTES = 26 * 64 * EXPERT_BYTES
ROUTED_BYTES = 6 * EXPERT_BYTES
ATTENTION_BYTES = 2 * 2048 * (16 * 192 + 512 + 64 + 16 * 128) + 2 * 512 * 16 * 256
LAYER_BYTES = ROUTED_BYTES + 2 * EXPERT_BYTES + ATTENTION_BYTES + 2 * 2048 * 64
CACHE_BYTES = (5e9, 10e9, 15e9, 20e9, 25e9)

# The memory that a layer's weights come from, GB/s: data sheets, and for the H200 as measured.
MEMORY_GBPS = {"a6000": 768, "a6000-paper": 768, "h200": 4300}
FIXED_STEPS = (1, 2, 4, MAX_HORIZON)
CLAIM, PERFECT = 1e-3, 5e-4


@dataclass
class Cell:
    """One machine, and the stall of each method as a share of on-demand's."""

    trace: str
    cache_gb: float
    profile: str
    layer_time: str
    layer_time_us: float
    on_demand_us: float
    stall: dict[str, float]
    fixed_step: int
    mean_horizon: float
    link_busy: float

    @property
    def claim(self) -> str:
        if self.stall["perfect"] > PERFECT:
            return "-"
        return "met" if self.stall["ours"] <= CLAIM else "MISSED"


def run_cell(
    trace, name: str, cache_bytes: float, profile: str, layer_time: tuple[str, float], warmup: int
) -> Cell:
    machine = Machine(
        expert_cache=cache_bytes / ALL_EXPERTS_BYTES,
        expert_bytes=EXPERT_BYTES,
        link=LINK_PROFILES[profile],
        layer_time_us=layer_time[1],
        expert_share=ROUTED_BYTES / LAYER_BYTES,
    )
    simulation = Simulation(trace, machine, warmup_tokens=warmup)
    predictor = own_predictor(trace)
    fixed = {step: simulation.run("lru", predictor, step) for step in FIXED_STEPS}
    best = min(fixed, key=lambda step: fixed[step]["stall_us_per_token"])
    rows = {
        "LRU": simulation.run("lru"),
        "fixed step": fixed[best],
        "ours, no prefetch": simulation.run("ours"),
        "ours": simulation.run("ours", predictor),
        "perfect": min(
            (simulation.run("ours", "oracle", horizon) for horizon in (None, MAX_HORIZON)),
            key=lambda row: row["stall_us_per_token"],
        ),
    }
    perfect = rows["perfect"]
    moved = perfect["demand_bytes_per_token"] + perfect["prefetch_bytes_per_token"]
    link_us = moved / machine.link.bandwidth_gbps / 1e3
    return Cell(
        trace=name,
        cache_gb=cache_bytes / 1e9,
        profile=profile,
        layer_time=layer_time[0],
        layer_time_us=layer_time[1],
        on_demand_us=simulation.run("on_demand")["stall_us_per_token"],
        stall={method: row["stall_vs_on_demand"] for method, row in rows.items()},
        fixed_step=best,
        mean_horizon=rows["ours"]["mean_horizon"],
        link_busy=link_us / (layer_time[1] * trace.num_layers),
    )


def own_predictor(trace: Trace) -> str:
    """The one that was recorded, or one that sees ids only."""
    return "ids" if trace.predicted_ids is None else "trace"


def trace_options(max_tokens: int, warmup_tokens: int) -> argparse.ArgumentParser:
    """Which traces to run, and how much of them: a parent of parsers."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE.npz")
    parser.add_argument("--max-tokens", type=int, default=max_tokens)
    parser.add_argument("--warmup-tokens", type=int, default=warmup_tokens)
    parser.add_argument(
        "--part",
        choices=("first", "second"),
        default="second",
        help="half of the trace: constants were fitted on first halves (default: %(default)s)",
    )
    return parser


def load_part(path: Path, options: argparse.Namespace) -> Trace:
    """What `trace_options` ask for, as one sequence: the simulator knows no sequences."""
    trace = load_trace(path)
    middle = trace.num_tokens // 2
    tokens = slice(None, middle) if options.part == "first" else slice(middle, None)
    return trace.part(tokens).head(options.max_tokens)


def table(cells: list[Cell]) -> str:
    methods = list(cells[0].stall)
    head = [
        "trace",
        "cache",
        "link",
        "layer time",
        "on-demand",
        *methods,
        "step",
        "S",
        "bound",
        "claim",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for c in cells:
        shares = [f"{c.stall[m]:.3%}" for m in methods]
        lines.append(
            f"| {c.trace} | {c.cache_gb:g} GB | {c.profile} | {c.layer_time}, "
            f"{c.layer_time_us:.0f} us | {c.on_demand_us / 1000:.1f} ms | {' | '.join(shares)} | "
            f"{c.fixed_step} | {c.mean_horizon:.1f} | "
            f"{'link' if c.link_busy > 1 else ''} {c.link_busy:.0%} | {c.claim} |"
        )
    claims = [c.claim for c in cells if c.claim != "-"]
    lines.append(
        f"\nThe perfect predictor stalls at most {PERFECT:.2%} in {len(claims)} of {len(cells)} "
        f"cells; ours at most {CLAIM:.1%} in {claims.count('met')} of these."
    )
    return "\n".join(lines)


def plot(cells: list[Cell], path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((c.trace, c.profile, c.layer_time) for c in cells))
    columns = len({(profile, time) for _, profile, time in panels})
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(3 * columns, 3 * (len(panels) / columns)),
        squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    for axis, panel in zip(axes.flat, panels, strict=False):
        mine = [c for c in cells if (c.trace, c.profile, c.layer_time) == panel]
        for method in mine[0].stall:
            shares = [max(c.stall[method], 1e-5) for c in mine]  # a logarithm has no 0
            axis.plot([c.cache_gb for c in mine], shares, marker=".", label=method)
        axis.axhline(CLAIM, color="gray", linestyle=":")
        axis.set(yscale="log", title="\n".join(panel))
    axes[0, 0].legend(fontsize="x-small")
    figure.supxlabel("cache, GB of 28.8")
    figure.supylabel("stall, share of on-demand (0.001 %: none)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[trace_options(max_tokens=12000, warmup_tokens=2000)],
    )
    parser.add_argument(
        "--eager-layer-time-us",
        type=float,
        default=load_layer_times()["h200"].eager_us,
        help="one layer of transformers' eager forward; default: %(default)s, of layer_times.json",
    )
    parser.add_argument("--out", type=Path, help="directory for cells.json, table.md, stall.png")
    options = parser.parse_args()

    cells = []
    for path in options.traces:
        trace = load_part(path, options)
        for profile, memory_gbps in MEMORY_GBPS.items():
            roofline = ("roofline", LAYER_BYTES / memory_gbps / 1e3)
            for layer_time in (roofline, ("eager", options.eager_layer_time_us)):
                for cache_bytes in CACHE_BYTES:
                    cells.append(
                        run_cell(
                            trace, path.stem, cache_bytes, profile, layer_time,
                            options.warmup_tokens,
                        )
                    )  # fmt: skip
    text = table(cells)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
        rows = [vars(cell) | {"claim": cell.claim} for cell in cells]
        (options.out / "cells.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        if not plot(cells, options.out / "stall.png"):
            print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
