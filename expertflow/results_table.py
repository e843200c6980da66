"""The table that shows runs of a model beside each other."""

from collections.abc import Sequence

from .cache import hit_rate
from .generation import Generation
from .memory import format_size


def results_table(rows: Sequence[tuple[str, Generation]]) -> str:
    """Return a table with one row for each named run."""
    head = ["", "expert cache", "hit rate", "tokens/s", "stall/token", "fetched/token"]
    is_biased = any(run.statistics["routes"] for _, run in rows)
    cells = [[*head, "changed routes"] if is_biased else head]
    for name, run in rows:
        fetched = run.statistics["demand_bytes"] + run.statistics["prefetch_bytes"]
        share = run.expert_cache_bytes / run.expert_pool_bytes
        cells.append(
            [
                name,
                f"{format_size(run.expert_cache_bytes)} ({share:.0%})",
                f"{hit_rate(run.statistics):.1%}",
                f"{run.tokens_per_second:.1f}",
                f"{run.stall_ms_per_token:.3f} ms",
                format_size(fetched // max(run.new_tokens, 1)),
            ]
        )
        if is_biased:
            changed = run.statistics["changed_routes"] / max(run.statistics["routes"], 1)
            cells[-1].append(f"{changed:.1%}")
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join((first, *others)))
    return "\n".join(lines)
