"""Sizes as users write them, and how much memory this process may still use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

_UNITS = {"b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_SIZE_FORMS = '"25%", "8GiB", "8GB", a fraction like 0.25, or a number of bytes as int'
_SIZE = re.compile(r"(-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(%|[a-z]*)")
_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes "no limit" as a huge number


@dataclass(frozen=True, slots=True)
class AvailableMemory:
    """How many bytes can still be allocated, and what sets that limit."""

    num_bytes: int
    source: str


def parse_size(value: str | float | int, whole_bytes: int, name: str) -> int:
    """Convert "25%", "8GiB", "8GB", 0.25 or an int of bytes into bytes, rounded down.

    Percentages and fractions are of `whole_bytes`; a string with a decimal point and no unit is
    a fraction, one without is a number of bytes. Raises ValueError that names `name`.
    """
    if isinstance(value, bool) or not isinstance(value, str | float | int):
        raise ValueError(f"{name}={value!r} is not a size. Use {_SIZE_FORMS}.")
    if isinstance(value, int):
        return _not_negative(value, value, name)
    match = _SIZE.fullmatch(str(value).strip().lower())
    if match is None:
        raise ValueError(f"{name}={value!r} is not a size. Use {_SIZE_FORMS}.")
    text, unit = match.groups()
    number = Fraction(text)  # decimal, so that 0.3 of 10 experts is 3 and not 2
    if unit == "%":
        return _part_of(number / 100, whole_bytes, value, name)
    if not unit and (isinstance(value, float) or not text.lstrip("-").isdigit()):
        return _part_of(number, whole_bytes, value, name)
    if unit and unit not in _UNITS:
        raise ValueError(f"{name}={value!r} has the unknown unit {unit!r}. Use {_SIZE_FORMS}.")
    return _not_negative(int(number * _UNITS[unit or "b"]), value, name)


def _part_of(part: Fraction, whole_bytes: int, value: object, name: str) -> int:
    if part > 1:
        raise ValueError(
            f"{name}={value!r} is more than the whole. Fractions go up to 1.0 and percentages up "
            'to "100%"; an absolute size needs a unit ("8GiB") or is an int of bytes.'
        )
    return _not_negative(int(part * whole_bytes), value, name)


def _not_negative(num_bytes: int, value: object, name: str) -> int:
    if num_bytes < 0 or str(value).startswith("-"):
        raise ValueError(f"{name}={value!r} is negative.")
    return num_bytes


def format_size(num_bytes: int) -> str:
    """A size for people: "512 B", "1.50 GiB"."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{num_bytes} B" if unit == "B" else f"{size:.2f} {unit}"


def available_memory(
    ram_limit: str | float | int | None = None, *, held_bytes: int = 0, root: Path = Path("/")
) -> AvailableMemory:
    """What this process may still allocate: the machine's free memory and every cgroup limit.

    Page cache counts as free, because the kernel drops it on demand. `ram_limit` (a size, or a
    fraction of what is available) replaces the measurement. `held_bytes` are in use already, but
    by what the answer is asked for. `root` is where proc and sys lie.
    """
    limits = [_machine_memory(root), *_cgroup_memory(root)]
    free = min(limits, key=lambda memory: memory.num_bytes)
    measured = AvailableMemory(free.num_bytes + held_bytes, free.source)
    if ram_limit is None:
        return measured
    return AvailableMemory(parse_size(ram_limit, measured.num_bytes, "ram_limit"), "ram_limit")


def check_ram(needed_bytes: int, available: AvailableMemory, what: str, advice: str) -> None:
    """Raise MemoryError if `needed_bytes` are not there; `advice` says what would fit."""
    if needed_bytes > available.num_bytes:
        raise MemoryError(
            f"{what} needs {format_size(needed_bytes)} of memory and "
            f"{format_size(available.num_bytes)} are available ({available.source}). {advice}"
        )


def _machine_memory(root: Path) -> AvailableMemory:
    table = _read_table(root / "proc/meminfo")
    if "MemAvailable" not in table:
        return AvailableMemory(_UNLIMITED_BYTES, "unknown: no /proc/meminfo")
    return AvailableMemory(table["MemAvailable"] * 1024, "MemAvailable in /proc/meminfo")


def _cgroup_memory(root: Path) -> list[AvailableMemory]:
    """What each limited cgroup from this process's own up to the top still allows."""
    found = []
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        fields = line.split(":", 2)
        if len(fields) != 3:
            continue  # nothing that the kernel writes
        _, controllers, path = fields
        if controllers == "":  # version 2, alone or beside version 1
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
            names = ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup/memory"]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # In a container the path may be the host's; then only the mount point itself is there.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            for depth in range(len(parts), -1, -1):
                memory = _group_memory(mount.joinpath(*parts[:depth]), *names)
                found += [memory] if memory is not None else []
    return found


def _group_memory(
    group: Path, limit_name: str, usage_name: str, stat_prefix: str
) -> AvailableMemory | None:
    """Limit minus usage of one cgroup, reclaimable page cache not counted; None: no limit."""
    limit, usage = _read_text(group / limit_name).strip(), _read_text(group / usage_name).strip()
    if not limit.isdigit() or not usage.isdigit() or int(limit) >= _UNLIMITED_BYTES:
        return None
    stat = _read_table(group / "memory.stat")
    cached = sum(stat.get(f"{stat_prefix}{kind}_file", 0) for kind in ("inactive", "active"))
    free_bytes = max(int(limit) - max(int(usage) - cached, 0), 0)
    return AvailableMemory(free_bytes, f"{group / limit_name}: {format_size(int(limit))}")


def _read_table(path: Path) -> dict[str, int]:
    """Lines of "name number" or "name: number kB"."""
    rows = (line.replace(":", " ").split() for line in _read_text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
