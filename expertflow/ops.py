"""Typed faces of `torch.ops.expertflow.*`, the only file that names them.

An op gets a cache as its *handle*, an int64 CPU tensor [2]: the number of the cache, and how many
ops were called on it. The ops declare the handle as mutated, which it is, so torch.compile neither
drops nor reorders them.
"""

from pathlib import Path

import torch
from torch import Tensor

from .errors import TransferError

torch.ops.load_library(str(Path(__file__).parent / "libexpertflow_ops.so"))
_ops = torch.ops.expertflow

# Columns of a plan's rows and values of its state column (csrc/core/plan.h).
EXPERT, SLOT, STATE, WAVE, NEXT_ROW = range(5)
HIT, LOADING, MISS = range(3)
NO_ROW = -1


def plan(cache: Tensor, expert_ids: Tensor, layer: int) -> Tensor:
    """Plan MoE layer `layer` for the routed `expert_ids` and start fetching what is missing.

    Args:
        cache: the handle.
        expert_ids: int64 [tokens, k] on the CPU, contiguous.
        layer: counted over the MoE layers only.

    Returns:
        int64 [rows, 5], a row for each distinct expert, in the order in which to compute: expert,
        slot, state (`HIT`, `LOADING`, `MISS`), wave, and the row that takes over the slot when this
        one is released, or `NO_ROW`. Valid until the next `plan`.

    Raises:
        IndexError: a layer or an expert id that the model does not have.
    """
    return _ops.plan(cache, expert_ids, layer)


def wait(cache: Tensor, row: int) -> None:
    """Block until the expert of `row` is in its slot. It stays there until `release`.

    Raises:
        TransferError: it could not be read.
    """
    try:
        _ops.wait(cache, row)
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        if not message.startswith("cannot load expert"):
            raise
        raise TransferError(message) from None


def release(cache: Tensor, row: int) -> None:
    """Give back the slot of `row`: the row that waits for it, if any, is fetched into it."""
    _ops.release(cache, row)


def prefetch(cache: Tensor, expert_ids: Tensor, layer: int, distance: int) -> None:
    """Fetch `expert_ids` (int64, CPU) of `layer`, behind all demands.

    They will be needed `distance` MoE layers from now. Experts that are resident or under way are
    skipped; when no slot can be had the rest is ignored.
    """
    _ops.prefetch(cache, expert_ids, layer, distance)


@torch.library.register_fake("expertflow::plan")
def _(cache: Tensor, expert_ids: Tensor, layer: int) -> Tensor:
    num_rows = torch.library.get_ctx().new_dynamic_size()
    return expert_ids.new_empty((num_rows, 5))


@torch.library.register_fake("expertflow::wait")
def _(cache: Tensor, row: int) -> None: ...


@torch.library.register_fake("expertflow::release")
def _(cache: Tensor, row: int) -> None: ...


@torch.library.register_fake("expertflow::prefetch")
def _(cache: Tensor, expert_ids: Tensor, layer: int, distance: int) -> None: ...
