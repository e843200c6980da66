"""The experts of one layer for many tokens at once, on GPUs that have a grouped matrix product.

All resident experts are one product, every other expert is one as it arrives. Also a single expert
goes through the grouped product: it rounds alike however many experts it is given, so the output
does not depend on what the cache holds.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from . import ops
from .cache import ExpertCache
from .slots import ExpertWeights

# (tokens [n, H] ordered by expert, weights of some experts, each [experts, ...], how many of the
# tokens each expert has [experts], and the sums of these counts) -> [n, H]
GroupedMlp = Callable[[Tensor, ExpertWeights, Tensor, Tensor], Tensor]

_MAX_WINDOW = 256  # slots in one product; those that are not of the layer cost 0.2 us each


def can_group(cache: ExpertCache) -> bool:
    """Whether torch has a fast grouped product for the experts of `cache` on its device."""
    if cache.device.type != "cuda" or cache.dtype != torch.bfloat16:
        return False
    is_aligned = all(
        size % 8 == 0 for shape in cache.segment_shapes.values() for size in shape[-2:]
    )
    return is_aligned and torch.cuda.get_device_capability(cache.device)[0] in (9, 10)


def compute_grouped(
    cache: ExpertCache,
    rows: Sequence[Sequence[int]],
    hidden_states: Tensor,
    expert_ids: Tensor,
    grouped_mlp: GroupedMlp,
) -> Tensor:
    """Return what each expert makes of each of its tokens, [tokens * k, hidden].

    Args:
        cache: it has begun the layer.
        rows: the plan's.
        hidden_states: [tokens, hidden].
        expert_ids: int64 [tokens, k].
        grouped_mlp: some experts.
    """
    num_hits = sum(row[ops.STATE] == ops.HIT for row in rows)  # they come first
    by_slot = sorted(range(num_hits), key=lambda index: rows[index][ops.SLOT])
    order = [*by_slot, *range(num_hits, len(rows))]
    windows = _windows([rows[index][ops.SLOT] for index in by_slot])
    counts = [rows[index][ops.COUNT] for index in order]
    ends = list(accumulate(counts, initial=0))

    # All that the device must know of the plan, in one go.
    rank_of = [0] * cache.num_experts
    for rank, index in enumerate(order):
        rank_of[rows[index][ops.EXPERT]] = rank
    window_counts = [_counts_by_slot(rows, by_slot[first:last]) for first, last in windows]
    uploaded = ops.upload([*rank_of, *counts, *chain(*window_counts)], expert_ids.device)
    ranks, counts_by_rank, *counts_by_slot = uploaded.split(
        [len(rank_of), len(counts), *map(len, window_counts)]
    )

    places = ranks[expert_ids.view(-1)].to(torch.int16).argsort(stable=True)
    tokens = hidden_states[places // expert_ids.shape[1]]  # in the order of the ranks
    output = torch.empty_like(tokens)

    def compute(first: int, last: int, of_slot: Tensor) -> None:
        first_slot, last_slot = rows[order[first]][ops.SLOT], rows[order[last - 1]][ops.SLOT]
        weights = cache.slots.stacked_weights(first_slot, last_slot + 1)
        part = slice(ends[first], ends[last])
        sums = of_slot if last - first == 1 else of_slot.cumsum(0, dtype=torch.int32)
        output[part] = grouped_mlp(tokens[part], weights, of_slot, sums)

    for (first, last), of_slot in zip(windows, counts_by_slot, strict=True):
        compute(first, last, of_slot)
    for index in range(num_hits):
        _release(cache, rows, index)
    for index in range(num_hits, len(rows)):
        ops.wait(cache.handle, index)
        compute(index, index + 1, counts_by_rank[index : index + 1])
        _release(cache, rows, index)
    partial = torch.empty_like(output)
    partial[places] = output
    return partial


def _release(cache: ExpertCache, rows: Sequence[Sequence[int]], index: int) -> None:
    if rows[index][ops.NEXT_ROW] != ops.NO_ROW:
        ops.release(cache.handle, index)


def _windows(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Cut ascending slots into ranges, of their indices, that are near each other."""
    ranges: list[tuple[int, int]] = []
    first = 0
    for index in range(1, len(slots) + 1):
        if index == len(slots) or slots[index] - slots[first] >= _MAX_WINDOW:
            ranges.append((first, index))
            first = index
    return ranges


def _counts_by_slot(rows: Sequence[Sequence[int]], window: Sequence[int]) -> list[int]:
    """How many tokens each slot of a window has, those between the rows' slots included."""
    of_slot = {rows[index][ops.SLOT]: rows[index][ops.COUNT] for index in window}
    return [of_slot.get(slot, 0) for slot in range(min(of_slot), max(of_slot) + 1)]
