"""Typed faces of `torch.ops.expertflow.*`, the only file that names them.

An op gets a cache as its *handle*, an int64 CPU tensor [2]: the number of the cache, and how many
ops were called on it. The ops declare the handle as mutated, which it is, so torch.compile neither
drops nor reorders them.
"""

from pathlib import Path

import torch
from torch import Tensor

from .errors import CudaError, TransferError

torch.ops.load_library(str(Path(__file__).parent / "libexpertflow_ops.so"))
_ops = torch.ops.expertflow

# Columns of a plan's rows and values of its state column (csrc/core/plan.h).
EXPERT, SLOT, STATE, WAVE, NEXT_ROW, COUNT = range(6)
HIT, LOADING, MISS = range(3)
NO_ROW = -1
# What `compute` takes (csrc/cuda/expert_mlp.h).
MAX_COMPUTE_TOKENS = 16
MAX_COMPUTE_PAIRS = 256


def _typed(error: RuntimeError) -> Exception:
    """What the RuntimeError of an op was in C++."""
    message = str(error).partition("\n")[0]
    if message.startswith("cannot load expert"):
        return TransferError(message)
    return CudaError(message) if message.startswith("cudaError") else error


def plan(cache: Tensor, expert_ids: Tensor, layer: int) -> Tensor:
    """Plan MoE layer `layer` for the routed `expert_ids` and start fetching what is missing.

    Args:
        cache: the handle.
        expert_ids: int64 [tokens, k] on the device of the cache, contiguous. On CUDA the call
            blocks until they are computed.
        layer: counted over the MoE layers only.

    Returns:
        int64 [rows, 6] on the CPU, a row for each distinct expert, in the order in which to
        compute: expert, slot, state (`HIT`, `LOADING`, `MISS`), wave, the row that takes over the
        slot when this one is released, or `NO_ROW`, and how often the expert stands in
        `expert_ids`. Valid until the next `plan`.

    Raises:
        IndexError: a layer or an expert id that the model does not have.
        CudaError: the work that computes the ids failed.
    """
    try:
        return _ops.plan(cache, expert_ids, layer)
    except RuntimeError as error:
        raise _typed(error) from None


def wait(cache: Tensor, row: int) -> None:
    """Block until the expert of `row` is in its slot. It stays there until `release`.

    On CUDA the current stream waits, and the host only until the copy is submitted.

    Raises:
        TransferError: it could not be read.
    """
    try:
        _ops.wait(cache, row)
    except RuntimeError as error:
        raise _typed(error) from None


def compute(
    cache: Tensor, hidden_states: Tensor, expert_weights: Tensor, output: Tensor | None = None
) -> Tensor:
    """Compute the experts of the layer that was planned last, for a few tokens, on CUDA.

    Resident experts come first, the others as they arrive. Gates are SiLU, or gpt-oss's where the
    experts have biases.

    Args:
        cache: the handle of a cache with `mlp_hidden`.
        hidden_states: [tokens, hidden] in the dtype of the experts, contiguous, at most
            `MAX_COMPUTE_TOKENS`; those whose `expert_ids` were planned.
        expert_weights: [tokens, k], contiguous, in that dtype or float32; at most
            `MAX_COMPUTE_PAIRS`.
        output: like `hidden_states`, where to put the result; default: a new tensor.

    Returns:
        The weighted sum over each token's experts, [tokens, hidden].

    Raises:
        TransferError: an expert could not be read.
    """
    if output is None:
        output = torch.empty_like(hidden_states)
    try:
        _ops.compute(cache, hidden_states, expert_weights, output)
    except RuntimeError as error:
        raise _typed(error) from None
    return output


def compute_slots(
    cache: Tensor, slots: Tensor, hidden_states: Tensor, expert_weights: Tensor, output: Tensor
) -> None:
    """Compute whichever experts are in `slots`, int64 [tokens, k] on the CPU.

    The rest is as for `compute`, whose kernels it runs. It asks nothing of the cache, so it can be
    captured in a CUDA graph, for slots that keep their experts meanwhile.
    """
    try:
        _ops.compute_slots(cache, slots, hidden_states, expert_weights, output)
    except RuntimeError as error:
        raise _typed(error) from None


def weighted_sum(partial: Tensor, expert_weights: Tensor) -> Tensor:
    """Sum what each token's experts returned, rounded as torch rounds it, on CUDA.

    Args:
        partial: [tokens * k, hidden].
        expert_weights: [tokens, k], in that dtype or float32.

    Returns:
        [tokens, hidden], in the dtype of `partial`.
    """
    output = partial.new_empty(expert_weights.shape[0], partial.shape[1])
    try:
        _ops.weighted_sum(partial, expert_weights, output)
    except RuntimeError as error:
        raise _typed(error) from None
    return output


def upload(values: list[int], device: torch.device) -> Tensor:
    """Return int32 `values` on a CUDA device, past the copies that are under way to it.

    A plain copy would wait in the copy engine behind experts.
    """
    output = torch.empty(len(values), dtype=torch.int32, device=device)
    try:
        _ops.upload(torch.tensor(values, dtype=torch.int32), output)
    except RuntimeError as error:
        raise _typed(error) from None
    return output


def release(cache: Tensor, row: int) -> None:
    """Give back the slot of `row`: the row that waits for it, if any, is fetched into it.

    On CUDA, once the work that is on the current stream by now has ended.
    """
    try:
        _ops.release(cache, row)
    except RuntimeError as error:
        raise _typed(error) from None


def prefetch(cache: Tensor, expert_ids: Tensor, layer: int, distance: int) -> None:
    """Fetch `expert_ids` (int64, CPU) of `layer`, behind all demands.

    They will be needed `distance` MoE layers from now. Experts that are resident or under way are
    skipped; when no slot can be had the rest is ignored.
    """
    _ops.prefetch(cache, expert_ids, layer, distance)


@torch.library.register_fake("expertflow::plan")
def _(cache: Tensor, expert_ids: Tensor, layer: int) -> Tensor:
    num_rows = torch.library.get_ctx().new_dynamic_size()
    return cache.new_empty((num_rows, 6))


@torch.library.register_fake("expertflow::compute")
def _(cache: Tensor, hidden_states: Tensor, expert_weights: Tensor, output: Tensor) -> None: ...


@torch.library.register_fake("expertflow::compute_slots")
def _(
    cache: Tensor, slots: Tensor, hidden_states: Tensor, expert_weights: Tensor, output: Tensor
) -> None: ...


@torch.library.register_fake("expertflow::weighted_sum")
def _(partial: Tensor, expert_weights: Tensor, output: Tensor) -> None: ...


@torch.library.register_fake("expertflow::upload")
def _(values: Tensor, output: Tensor) -> None: ...


@torch.library.register_fake("expertflow::wait")
def _(cache: Tensor, row: int) -> None: ...


@torch.library.register_fake("expertflow::release")
def _(cache: Tensor, row: int) -> None: ...


@torch.library.register_fake("expertflow::prefetch")
def _(cache: Tensor, expert_ids: Tensor, layer: int, distance: int) -> None: ...
