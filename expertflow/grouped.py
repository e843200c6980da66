"""The experts of one layer for many tokens at once, on GPUs that have a grouped matrix product.

All resident experts are one product, and every two others as they arrive: for each alone the host
would take about as long as its copy. Also a single expert goes through the grouped product: it
rounds alike however many experts it is given, so the output does not depend on what the cache
holds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
# Slots that a layer's misses take in turn: with fewer, two that are computed together would leave
# the link idle.
_FEWEST_IN_TURN = 4


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a plan that are one product, by ascending slot."""

    rows: list[int]
    slots: slice  # with theirs, and others between
    counts: list[int]  # how many tokens each of the slots has


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
    parts = [*_windows(rows, num_hits), *_arrivals(rows, num_hits)]
    order = [index for part in parts for index in part.rows]

    # All that the device must know of the plan, in one go.
    rank_of = [0] * cache.num_experts
    for rank, index in enumerate(order):
        rank_of[rows[index][ops.EXPERT]] = rank
    sums = [list(accumulate(part.counts)) for part in parts]
    counts = [part.counts for part in parts]
    uploaded = ops.upload([*rank_of, *chain(*counts, *sums)], expert_ids.device)
    ranks, *by_slot = uploaded.split([len(rank_of), *map(len, counts + sums)])

    places = ranks[expert_ids.view(-1)].to(torch.int16).argsort(stable=True)
    tokens = hidden_states[places // expert_ids.shape[1]]  # in the order of the ranks
    output = torch.empty_like(tokens)
    first_token = 0
    for number, part in enumerate(parts):
        for index in part.rows:
            if index >= num_hits:
                ops.wait(cache.handle, index)
        of_part = slice(first_token, first_token + sums[number][-1])
        weights = cache.slots.stacked_weights(part.slots)
        part_counts, part_ends = by_slot[number], by_slot[len(parts) + number]
        output[of_part] = grouped_mlp(tokens[of_part], weights, part_counts, part_ends)
        for index in part.rows:
            _release(cache, rows, index)
        first_token = of_part.stop
    partial = torch.empty_like(output)
    partial[places] = output
    return partial


def _release(cache: ExpertCache, rows: Sequence[Sequence[int]], index: int) -> None:
    if rows[index][ops.NEXT_ROW] != ops.NO_ROW:
        ops.release(cache.handle, index)


def _windows(rows: Sequence[Sequence[int]], num_hits: int) -> list[_Part]:
    """Cut the rows that are resident into parts whose slots are near each other."""
    parts: list[list[int]] = []
    for index in sorted(range(num_hits), key=lambda index: rows[index][ops.SLOT]):
        if parts and rows[index][ops.SLOT] - rows[parts[-1][0]][ops.SLOT] < _MAX_WINDOW:
            parts[-1].append(index)
        else:
            parts.append([index])
    return [_part(rows, part) for part in parts]


def _arrivals(rows: Sequence[Sequence[int]], num_hits: int) -> list[_Part]:
    """Cut the other rows into twos: two slots, wherever they are, are evenly spaced."""
    parts = []
    index = num_hits
    while index < len(rows):
        is_single = index < rows[index][ops.NEXT_ROW] < index + _FEWEST_IN_TURN
        part = range(index, min(index + (1 if is_single else 2), len(rows)))
        parts.append(_part(rows, sorted(part, key=lambda index: rows[index][ops.SLOT])))
        index = part.stop
    return parts


def _part(rows: Sequence[Sequence[int]], part: list[int]) -> _Part:
    """Of rows by ascending slot; with as few slots between theirs as even spaces leave."""
    count_of = {rows[index][ops.SLOT]: rows[index][ops.COUNT] for index in part}
    first, *others = count_of
    step = math.gcd(*(slot - first for slot in others)) or 1
    slots = range(first, max(count_of) + 1, step)
    return _Part(part, slice(first, slots.stop, step), [count_of.get(slot, 0) for slot in slots])
