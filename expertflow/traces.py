"""Routing traces: what a router did, token by token, in an .npz file.

- `expert_ids` `[tokens, layers, k]`, integers: the experts of each token in each MoE layer
- `num_experts`, an integer: experts of a layer
- `sequence_offsets` `[sequences + 1]`, integers: where each sequence begins; the last is `tokens`
- `weights` `[tokens, layers, k]`, floats, optional: what the router gave each expert
- `predicted_ids` `[tokens, layers, distances, m]`, integers, optional: experts foreseen at layer
  `l` for layer `l + 1 + i` at distance index `i`, the most probable first
- `predicted_need`, float16, of the same shape, with `predicted_ids`: the probability that each is
  needed, 0 where there is no such layer
- `first_predicted_ids` `[tokens, distances, m]` and `first_predicted_need` of that shape, optional,
  with `predicted_ids`, whose distances and candidates they have: what was foreseen for layer `i`
  once the token's id was known
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

_MAX_EXPERTS = 1 << 16  # ids are held in 16 bits
_PREDICTED_AXES = ("token", "layer", "distance", "candidate")
_FIRST_AXES = ("token", "distance", "candidate")


@dataclass(frozen=True, slots=True)
class Trace:
    """Recorded routing; the module says what the arrays hold. Ids are uint16 here."""

    expert_ids: NDArray[np.uint16]
    num_experts: int
    sequence_offsets: NDArray[np.int64]
    weights: NDArray[Any] | None = None
    predicted_ids: NDArray[np.uint16] | None = None
    predicted_need: NDArray[np.float16] | None = None
    first_predicted_ids: NDArray[np.uint16] | None = None
    first_predicted_need: NDArray[np.float16] | None = None

    @property
    def num_tokens(self) -> int:
        """All tokens of all sequences."""
        return int(self.expert_ids.shape[0])

    @property
    def num_layers(self) -> int:
        """Layers with experts."""
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        """Experts of one token in one layer."""
        return int(self.expert_ids.shape[2])

    def head(self, num_tokens: int) -> Trace:
        """The first tokens, without a copy; the whole trace if it is no longer than that."""
        if num_tokens >= self.num_tokens:
            return self
        inside = self.sequence_offsets[self.sequence_offsets < num_tokens]
        return self.part(slice(num_tokens), np.append(inside, np.int64(num_tokens)))

    def part(self, tokens: slice, sequence_offsets: NDArray[np.int64] | None = None) -> Trace:
        """Some of the tokens, without a copy: as one sequence, unless offsets are given."""

        def of(array: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if array is None else array[tokens]

        expert_ids = self.expert_ids[tokens]
        if sequence_offsets is None:
            sequence_offsets = np.array([0, len(expert_ids)], np.int64)
        return Trace(
            expert_ids=expert_ids,
            num_experts=self.num_experts,
            sequence_offsets=sequence_offsets,
            weights=of(self.weights),
            predicted_ids=of(self.predicted_ids),
            predicted_need=of(self.predicted_need),
            first_predicted_ids=of(self.first_predicted_ids),
            first_predicted_need=of(self.first_predicted_need),
        )


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace and check it.

    Raises FileNotFoundError, and ValueError that names the file, the array and the place of what is
    wrong.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            arrays = _read_arrays(file)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a trace: {error}") from error
    try:
        return make_trace(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_trace(path: str | os.PathLike[str], trace: Trace) -> None:
    """Write a trace, ids in one byte where they fit; a file is replaced once all is written."""
    path = Path(path)
    id_type = np.uint8 if trace.num_experts <= 1 << 8 else np.uint16
    arrays: dict[str, Any] = {
        "expert_ids": trace.expert_ids.astype(id_type),
        "num_experts": np.int64(trace.num_experts),
        "sequence_offsets": trace.sequence_offsets,
    }
    if trace.weights is not None:
        arrays["weights"] = trace.weights
    if trace.predicted_ids is not None and trace.predicted_need is not None:
        arrays["predicted_ids"] = trace.predicted_ids.astype(id_type)
        arrays["predicted_need"] = trace.predicted_need
    if trace.first_predicted_ids is not None and trace.first_predicted_need is not None:
        arrays["first_predicted_ids"] = trace.first_predicted_ids.astype(id_type)
        arrays["first_predicted_need"] = trace.first_predicted_need
    make_trace(arrays)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def make_trace(arrays: Mapping[str, Any]) -> Trace:
    """Check arrays by their names in the file; others are ignored.

    Raises ValueError that names the array and the place.
    """
    for name in ("expert_ids", "num_experts", "sequence_offsets"):
        if name not in arrays:
            raise ValueError(f"the array {name} is missing")
    num_experts = _num_experts(np.asarray(arrays["num_experts"]))
    expert_ids = _ids(arrays, "expert_ids", ("token", "layer", "position"), num_experts)
    if expert_ids.shape[2] > num_experts:
        raise ValueError(
            f"expert_ids has {expert_ids.shape[2]} experts for each token, but num_experts is "
            f"{num_experts}"
        )
    offsets = _offsets(np.asarray(arrays["sequence_offsets"]), expert_ids.shape[0])
    tokens_and_layers = expert_ids.shape[:2]
    predicted_ids, predicted_need = _predictions(
        arrays, "predicted", _PREDICTED_AXES, tokens_and_layers, num_experts
    )
    first_ids, first_need = _predictions(
        arrays, "first_predicted", _FIRST_AXES, tokens_and_layers[:1], num_experts
    )
    if first_ids is not None:
        _check_fits(first_ids, predicted_ids)
    return Trace(
        expert_ids=expert_ids,
        num_experts=num_experts,
        sequence_offsets=offsets,
        weights=_weights(arrays, expert_ids.shape),
        predicted_ids=predicted_ids,
        predicted_need=predicted_need,
        first_predicted_ids=first_ids,
        first_predicted_need=first_need,
    )


def _read_arrays(file: BinaryIO) -> dict[str, NDArray[Any]]:
    archive = np.load(file, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("it holds one array, not an archive of named ones")
    arrays = {}
    for name in archive.files:
        try:
            arrays[name] = np.asarray(archive[name])
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"the array {name} cannot be read: {error}") from error
    return arrays


def _num_experts(array: NDArray[Any]) -> int:
    if array.shape != () or array.dtype.kind not in "iu":
        raise ValueError(
            f"num_experts must be one integer, not {array.dtype} of shape {list(array.shape)}"
        )
    if not 1 <= int(array) <= _MAX_EXPERTS:
        raise ValueError(f"num_experts is {int(array)}, not 1 to {_MAX_EXPERTS}")
    return int(array)


def _ids(
    arrays: Mapping[str, Any], name: str, axes: tuple[str, ...], num_experts: int
) -> NDArray[np.uint16]:
    ids = np.asarray(arrays[name])
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, not {ids.dtype}")
    if ids.ndim != len(axes) or 0 in ids.shape:
        raise ValueError(
            f"{name} must have shape [{', '.join(axis + 's' for axis in axes)}] without an empty "
            f"axis, not {list(ids.shape)}"
        )
    outside = (ids < 0) | (ids >= num_experts)
    if outside.any():
        place, where = _first_place(outside, axes)
        raise ValueError(
            f"{name} at {where} is {int(ids[place])}, but the experts are 0 to {num_experts - 1}"
        )
    return np.ascontiguousarray(ids, dtype=np.uint16)


def _first_place(found: NDArray[np.bool_], axes: tuple[str, ...]) -> tuple[tuple[Any, ...], str]:
    """The index of the first True, and what to call it."""
    place = np.unravel_index(int(found.argmax()), found.shape)
    return place, ", ".join(f"{axis} {int(i)}" for axis, i in zip(axes, place, strict=True))


def _offsets(offsets: NDArray[Any], num_tokens: int) -> NDArray[np.int64]:
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or offsets.size < 2:
        raise ValueError(
            "sequence_offsets must be at least two integers in one row, not "
            f"{offsets.dtype} of shape {list(offsets.shape)}"
        )
    if offsets[0] != 0:
        raise ValueError(
            f"sequence_offsets[0] is {int(offsets[0])}, but the first sequence is at 0"
        )
    falls = offsets[1:] < offsets[:-1]
    if falls.any():
        i = int(falls.argmax()) + 1
        raise ValueError(
            f"sequence_offsets[{i}] is {int(offsets[i])}, less than the {int(offsets[i - 1])} "
            "before it"
        )
    if offsets[-1] != num_tokens:
        raise ValueError(
            f"sequence_offsets[{offsets.size - 1}] is {int(offsets[-1])}, but there are "
            f"{num_tokens} tokens"
        )
    return offsets.astype(np.int64)


def _weights(arrays: Mapping[str, Any], shape: tuple[int, ...]) -> NDArray[Any] | None:
    if "weights" not in arrays:
        return None
    weights = np.asarray(arrays["weights"])
    _check_float(weights, "weights", shape)
    return weights


def _predictions(
    arrays: Mapping[str, Any],
    name: str,
    axes: tuple[str, ...],
    leading: tuple[int, ...],
    num_experts: int,
) -> tuple[NDArray[np.uint16] | None, NDArray[np.float16] | None]:
    """The arrays NAME_ids and NAME_need, whose first axes are those of expert_ids."""
    if (f"{name}_ids" in arrays) != (f"{name}_need" in arrays):
        raise ValueError(f"{name}_ids and {name}_need must come together")
    if f"{name}_ids" not in arrays:
        return None, None
    ids = _ids(arrays, f"{name}_ids", axes, num_experts)
    for axis, found, expected in zip(axes, ids.shape, leading, strict=False):
        if found != expected:
            raise ValueError(f"{name}_ids is of {found} {axis}s, but expert_ids of {expected}")
    need = np.asarray(arrays[f"{name}_need"])
    _check_float(need, f"{name}_need", ids.shape)
    outside = ~((need >= 0) & (need <= 1))
    if outside.any():
        place, where = _first_place(outside, axes)
        raise ValueError(f"{name}_need at {where} is {need[place]}, not in [0, 1]")
    return ids, need.astype(np.float16, copy=False)


def _check_fits(first_ids: NDArray[Any], predicted_ids: NDArray[Any] | None) -> None:
    if predicted_ids is None:
        raise ValueError("first_predicted_ids is there, but predicted_ids is missing")
    if first_ids.shape[1:] != predicted_ids.shape[2:]:
        raise ValueError(
            f"first_predicted_ids has distances and candidates {list(first_ids.shape[1:])}, but "
            f"predicted_ids {list(predicted_ids.shape[2:])}"
        )


def _check_float(array: NDArray[Any], name: str, shape: tuple[int, ...]) -> None:
    if array.dtype.kind != "f":
        raise ValueError(f"{name} must hold floating-point numbers, not {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(array.shape)}")
