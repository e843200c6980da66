"""The experts of one layer for many tokens at once, on GPUs that have a grouped matrix product.

All resident experts are one product, every other expert is one as it arrives. Also a single expert
goes through the grouped product: it rounds alike however many experts it is given, so the output
does not depend on what the cache holds.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import ops
from .cache import ExpertCache, ExpertWeights

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
    partial: Tensor,
) -> None:
    """Fill `partial` [tokens * k, hidden] with what each expert makes of each of its tokens.

    Args:
        cache: it has begun the layer.
        rows: the plan's.
        hidden_states: [tokens, hidden].
        expert_ids: int64 [tokens, k].
        grouped_mlp: some experts.
        partial: the result.
    """
    num_hits = sum(row[ops.STATE] == ops.HIT for row in rows)  # they come first
    by_slot = sorted(range(num_hits), key=lambda index: rows[index][ops.SLOT])
    order = _Order(cache, rows, [*by_slot, *range(num_hits, len(rows))], expert_ids)

    def compute(first: int, last: int) -> None:
        places = order.places(first, last)
        weights, counts = order.window(first, last)
        tokens = hidden_states[places // expert_ids.shape[1]]
        partial[places] = grouped_mlp(tokens, weights, counts, counts.cumsum(0, dtype=torch.int32))

    for first, last in order.windows(num_hits):
        compute(first, last)
    for index in range(num_hits):
        _release(cache, rows, index)
    for index in range(num_hits, len(rows)):
        ops.wait(cache.handle, index)
        compute(index, index + 1)
        _release(cache, rows, index)


def _release(cache: ExpertCache, rows: Sequence[Sequence[int]], index: int) -> None:
    if rows[index][ops.NEXT_ROW] != ops.NO_ROW:
        ops.release(cache.handle, index)


class _Order:
    """The rows of a plan in the order of computing, and all routed tokens in that order."""

    def __init__(
        self,
        cache: ExpertCache,
        rows: Sequence[Sequence[int]],
        order: Sequence[int],
        expert_ids: Tensor,
    ) -> None:
        self._cache = cache
        self._slots = [rows[index][ops.SLOT] for index in order]
        self._counts = [rows[index][ops.COUNT] for index in order]
        self._ends = [0]
        for count in self._counts:
            self._ends.append(self._ends[-1] + count)
        rank = torch.zeros(cache.num_experts, dtype=torch.int16)
        rank[[rows[index][ops.EXPERT] for index in order]] = torch.arange(
            len(order), dtype=torch.int16
        )
        rank = rank.to(expert_ids.device, non_blocking=True)
        self._places = rank[expert_ids.view(-1)].argsort(stable=True)

    def places(self, first: int, last: int) -> Tensor:
        """Where the tokens of ranks `first` to `last` stand in the flattened ids."""
        return self._places[self._ends[first] : self._ends[last]]

    def windows(self, num_hits: int) -> list[tuple[int, int]]:
        """Cut the first ranks, which ascend by slot, into ranges that are near each other."""
        ranges: list[tuple[int, int]] = []
        first = 0
        for rank in range(1, num_hits + 1):
            if rank == num_hits or self._slots[rank] - self._slots[first] >= _MAX_WINDOW:
                ranges.append((first, rank))
                first = rank
        return ranges

    def window(self, first: int, last: int) -> tuple[ExpertWeights, Tensor]:
        """The slots from that of rank `first` to that before `last`: weights, and token counts."""
        first_slot, last_slot = self._slots[first], self._slots[last - 1] + 1
        of_slot = dict(zip(self._slots[first:last], self._counts[first:last], strict=True))
        counts = torch.tensor(
            [of_slot.get(slot, 0) for slot in range(first_slot, last_slot)], dtype=torch.int32
        )
        weights = self._cache.stacked_weights(first_slot, last_slot)
        return weights, counts.to(self._places.device, non_blocking=True)
