"""`expertflow simulate`: what a cache would cost on a recorded trace."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..link_profiles import LINK_PROFILES, link_profile
from ..memory import parse_size
from ..simulation import MAX_HORIZON, POLICIES, PREDICTORS, Machine, Simulation, combinations
from ..traces import load_trace
from .options import not_negative

_COLUMNS = {
    "policy": "policy",
    "predictor": "predictor",
    "horizon": "horizon",
    "hit_rate": "hit rate",
    "prefetch_hit_rate": "prefetched",
    "late_hit_rate": "late",
    "stall_us_per_token": "stall us/token",
    "stall_vs_on_demand": "of on-demand",
    "demand_bytes_per_token": "demand MB",
    "prefetch_bytes_per_token": "prefetch MB",
    "wasted_bytes_per_token": "wasted MB",
    "gap_closed": "gap closed",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of the command line."""
    parser = commands.add_parser(
        "simulate",
        help="what a cache would cost on a recorded trace",
        description="Replay a routing trace under a virtual clock: the planner, queue and prefetch "
        "rules of the real cache, on a machine that does not have to be there.",
    )
    parser.add_argument("--trace", required=True, metavar="FILE.npz")
    parser.add_argument("--expert-cache", default="25%", metavar="SIZE", help='"25%%", "20GB", ...')
    parser.add_argument("--expert-bytes", required=True, metavar="N", help="one expert")
    parser.add_argument(
        "--profile",
        required=True,
        metavar="NAME|FILE.json",
        help=f"link: {', '.join(LINK_PROFILES)}, or a file with bandwidth_gbps and latency_us",
    )
    parser.add_argument(
        "--layer-time-us", required=True, type=not_negative, metavar="N", help="compute of a layer"
    )
    parser.add_argument("--policy", choices=(*POLICIES, "all"), default="ours")
    parser.add_argument("--predictor", choices=(*PREDICTORS, "all"), default="none")
    parser.add_argument(
        "--horizon",
        type=_horizon,
        default=None,
        metavar="auto|N",
        help=f"layers to prefetch ahead, up to {MAX_HORIZON} (default: auto)",
    )
    parser.add_argument("--cache-scope", choices=("global", "layer"), default="global")
    parser.add_argument("--warmup-tokens", type=_count, default=0, metavar="N")
    parser.add_argument("--max-tokens", type=_count, metavar="N", help="warm-up included")
    parser.add_argument("--json", action="store_true", help="print a JSON array of rows")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    machine = Machine(
        expert_cache=options.expert_cache,
        expert_bytes=parse_size(options.expert_bytes, 0, "--expert-bytes"),
        link=link_profile(options.profile),
        layer_time_us=options.layer_time_us,
        cache_scope=options.cache_scope,
    )
    trace = load_trace(options.trace)
    if options.max_tokens is not None:
        trace = trace.head(options.max_tokens)
    simulation = Simulation(trace, machine, warmup_tokens=options.warmup_tokens)
    rows = [
        simulation.run(policy, predictor, options.horizon)
        for policy, predictor in combinations(trace, options.policy, options.predictor)
    ]
    print(json.dumps(rows) if options.json else _table(rows))
    return 0


def _table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [list(_COLUMNS.values())]
    cells += [[_cell(name, row[name]) for name in _COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if name.endswith("bytes_per_token"):
        return f"{value / 1e6:.1f}"
    if name == "stall_us_per_token":
        return f"{value:.1f}"
    return f"{value:.2%}" if name == "stall_vs_on_demand" else f"{value:.1%}"


def _horizon(text: str) -> int | None:
    if text == "auto":
        return None
    horizon = int(text)
    if not 0 <= horizon <= MAX_HORIZON:
        raise argparse.ArgumentTypeError(f"{text} is not auto or 0 to {MAX_HORIZON}")
    return horizon


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value
