"""The links that experts travel over, as the simulator takes them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """A link carries one copy after the other; each takes its latency and its bytes."""

    bandwidth_gbps: float  # 1e9 bytes a second
    latency_us: float  # of each copy, during which it occupies the link


LINK_PROFILES = {
    # PCIe 4.0 x16: 31.5 GB/s raw, about 25 of them for pinned copies to the GPU.
    "a6000": LinkProfile(25.0, 3.0),
    "rtx4090": LinkProfile(25.0, 3.0),
    # What the ExpertFlow paper takes for the A6000: both directions of PCIe 4.0 x16 together.
    "a6000-paper": LinkProfile(64.0, 3.0),
    # PCIe 5.0 x16, measured (DESIGN.md): 55.4 GB/s at 352 MB, and 54.5 for queued copies of 9 MiB,
    # which leaves 2.8 us for each.
    "h200": LinkProfile(55.4, 2.8),
    "infinite": LinkProfile(math.inf, 0.0),
}


def link_profile(name: str) -> LinkProfile:
    """A profile by its name, or from a JSON file with `bandwidth_gbps` and `latency_us`.

    Raises ValueError for an unknown name or a file that holds something else, FileNotFoundError.
    """
    if name in LINK_PROFILES:
        return LINK_PROFILES[name]
    if not name.endswith(".json"):
        raise ValueError(
            f"profile {name!r} is unknown. Use {', '.join(LINK_PROFILES)}, or a file FILE.json "
            'with {"bandwidth_gbps": 25.0, "latency_us": 3.0}.'
        )
    try:
        values = json.loads(Path(name).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(values, dict) or set(values) != {"bandwidth_gbps", "latency_us"}:
        raise ValueError(f"{name} must hold an object with bandwidth_gbps and latency_us")
    return LinkProfile(
        bandwidth_gbps=_number(name, values, "bandwidth_gbps", above_zero=True),
        latency_us=_number(name, values, "latency_us", above_zero=False),
    )


def _number(name: str, values: dict[str, Any], key: str, *, above_zero: bool) -> float:
    value = values[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (above_zero and value == 0):
        kind = "positive number" if above_zero else "number of at least 0"
        raise ValueError(f"{name}: {key} is {value!r}, not a {kind}")
    return float(value)
