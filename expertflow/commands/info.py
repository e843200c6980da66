"""`expertflow info`: sizes of a model, and what would fit."""

import argparse
import dataclasses
import json
from typing import Any

from ..memory import format_size
from ..model_info import ModelInfo, model_info
from .options import add_model, add_ram_limit


def add_parser(commands: Any) -> None:
    """Add the command to `commands`, argparse's subparsers."""
    info = commands.add_parser("info", help="sizes of a model, and what would fit")
    add_model(info)
    info.add_argument("--dtype", default="auto")
    add_ram_limit(info)
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    info = model_info(options.model, dtype=options.dtype, ram_limit=options.ram_limit)
    if options.json:
        print(json.dumps(dataclasses.asdict(info)))
    else:
        print(_describe(info))
    return 0


def _describe(info: ModelInfo) -> str:
    fits = "does not fit: use --pool file"
    if info.fits_ram_pool:
        fits = "fits with --expert-cache 100%, the pool itself"
    if info.largest_ram_pool_cache_bytes:
        fits = f"fits with a cache of up to {format_size(info.largest_ram_pool_cache_bytes)}"
    facts: dict[str, Any] = {
        "model": f"{info.path} ({info.model_type}, {info.dtype})",
        "layers": f"{info.num_layers}, {info.num_moe_layers} of them with experts",
        "experts": f"{info.num_experts} a layer, {info.top_k} for each token",
        "bytes per expert": f"{info.expert_bytes} ({format_size(info.expert_bytes)})",
        "all experts": format_size(info.expert_bytes_total),
        "everything else": format_size(info.other_bytes),
        "smallest legal cache": f"{info.smallest_cache_bytes} bytes "
        f"({info.smallest_cache_bytes / info.expert_bytes_total:.2%})",
        "available memory": f"{format_size(info.ram_available_bytes)} ({info.ram_source})",
        "pool in RAM": fits,
        "largest cache that fits": f"{format_size(info.largest_cache_bytes)} with --pool file "
        f"({info.largest_cache_bytes / info.expert_bytes_total:.0%} of the experts)",
    }
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {fact}" for name, fact in facts.items())
