"""Finds every expert of a model in its checkpoint and says which bytes make it up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from ._core import DTYPE_CODES
from .checkpoint import CheckpointIndex, TensorEntry
from .errors import CheckpointError, UnsupportedModelError
from .families import Family, ModelSkeleton

# What experts may be stored and computed in, and how safetensors calls it.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """A run of elements of one expert that lies in one piece in a file."""

    file_index: int
    file_offset: int  # bytes
    segment: str
    segment_offset: int  # elements
    num_elements: int
    dtype: str


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """The parts of every expert; row = MoE layer * experts per layer + expert."""

    parts: Sequence[Sequence[ExpertPart]]
    num_bytes: int  # in the checkpoint's dtypes

    @property
    def dtype(self) -> str:
        """The widest dtype that the checkpoint stores experts in."""
        dtypes = {part.dtype for row in self.parts for part in row}
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    def extents(self, segments: Sequence[tuple[str, str, int, int]]) -> NDArray[np.int64]:
        """The parts as [experts, parts, (file, file offset, slot offset, elements, dtype code)].

        `segments` are those of an ExpertLayout: (name, dtype, offset in the slot, bytes).
        """
        table = {
            name: (offset_bytes, DTYPES[dtype].itemsize)
            for name, dtype, offset_bytes, _ in segments
        }
        rows = []
        for row in self.parts:
            extents = []
            for part in row:
                start, element_bytes = table[part.segment]
                slot_offset = start + part.segment_offset * element_bytes
                extents.append(
                    (
                        part.file_index,
                        part.file_offset,
                        slot_offset,
                        part.num_elements,
                        DTYPE_CODES[part.dtype],
                    )
                )
            rows.append(sorted(extents, key=lambda extent: extent[2]))
        return np.array(rows, dtype=np.int64)


def locate_experts(
    index: CheckpointIndex, family: Family, skeleton: ModelSkeleton, path: str
) -> ExpertTensors:
    """Find and check the tensors of all experts.

    Raises CheckpointError for a missing tensor, a wrong shape or a number of experts that
    disagrees with config.json, and UnsupportedModelError for a dtype that is not a float32,
    bfloat16 or float16; each names the tensor and its file.
    """
    by_module = _group_by_module(index)
    rows: list[list[ExpertPart]] = []
    for module_name in skeleton.moe_layers:
        prefix, names = _find_layer(by_module, module_name, family, skeleton, path)
        layer = _Layer(index, skeleton, prefix, names)
        if names & skeleton.segment_shapes.keys():
            rows += layer.fused()
        else:
            rows += layer.per_expert(family.per_expert)
    if len({len(row) for row in rows}) != 1:
        raise UnsupportedModelError(
            f"{path}: some layers store their experts fused and others one by one. Save the model "
            "again with transformers' save_pretrained."
        )
    num_bytes = sum(part.num_elements * DTYPES[part.dtype].itemsize for row in rows for part in row)
    return ExpertTensors(rows, num_bytes)


def _group_by_module(index: CheckpointIndex) -> dict[str, set[str]]:
    """Name of each experts module in the checkpoint -> what its tensors are called below it."""
    groups: dict[str, set[str]] = {}
    for name in index.tensors:
        module, separator, rest = name.partition(".experts.")
        if separator:
            groups.setdefault(f"{module}.experts", set()).add(rest)
    return groups


def _find_layer(
    by_module: Mapping[str, set[str]],
    module_name: str,
    family: Family,
    skeleton: ModelSkeleton,
    path: str,
) -> tuple[str, set[str]]:
    """The name that the checkpoint has for an experts module, and its tensors."""
    in_family = module_name.replace(".mlp.", f".{family.block_name}.")
    prefix = f"{skeleton.base_model_prefix}."
    for name in dict.fromkeys((in_family, module_name)):
        for candidate in (name, name.removeprefix(prefix)):
            if candidate in by_module:
                return candidate, by_module[candidate]
    raise CheckpointError(
        f"{path}: the checkpoint has no experts for {module_name}: no tensor starts with "
        f"{in_family}. Does config.json belong to these weights?"
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    """One experts module of the checkpoint: `names` are its tensors, relative to `prefix`."""

    index: CheckpointIndex
    skeleton: ModelSkeleton
    prefix: str
    names: set[str]

    def fused(self) -> list[list[ExpertPart]]:
        """Parts of every expert, from tensors [experts, ...] as in the module's parameters."""
        num_experts = self.skeleton.num_experts
        rows: list[list[ExpertPart]] = [[] for _ in range(num_experts)]
        for segment, shape in self.skeleton.segment_shapes.items():
            entry, dtype = self._tensor(segment, None)
            if len(entry.shape) == len(shape) + 1 and entry.shape[0] != num_experts:
                self._refuse_count(entry.shape[0], self.index.file_of(f"{self.prefix}.{segment}"))
            self._check_shape(segment, entry, (num_experts, *shape))
            num_elements = prod(shape)
            for expert, row in enumerate(rows):
                offset = entry.offset + expert * num_elements * DTYPES[dtype].itemsize
                row.append(ExpertPart(entry.file_index, offset, segment, 0, num_elements, dtype))
        self._refuse_others(set(self.skeleton.segment_shapes))
        return rows

    def per_expert(self, per_expert: Mapping[str, tuple[str, ...]]) -> list[list[ExpertPart]]:
        """Parts of every expert, from tensors "<expert>.<name>"."""
        num_experts = self.skeleton.num_experts
        found = {int(name.partition(".")[0]) for name in self.names if name[0].isdigit()}
        if found != set(range(num_experts)) and found == set(range(len(found))):
            self._refuse_count(len(found), None)
        used: set[str] = set()
        rows = []
        for expert in range(num_experts):
            row: list[ExpertPart] = []
            for segment, shape in self.skeleton.segment_shapes.items():
                names = [f"{expert}.{name}" for name in per_expert.get(segment, (segment,))]
                row += self._stacked(segment, shape, names)
                used.update(names)
            rows.append(row)
        self._refuse_others(used)
        return rows

    def _stacked(
        self, segment: str, shape: tuple[int, ...], names: Sequence[str]
    ) -> list[ExpertPart]:
        """One segment of one expert, from tensors of equal shape stacked along the first axis."""
        part_shape = (shape[0] // len(names), *shape[1:])
        num_elements = prod(part_shape)
        parts = []
        for position, name in enumerate(names):
            entry, dtype = self._tensor(name, part_shape)
            parts.append(
                ExpertPart(
                    entry.file_index,
                    entry.offset,
                    segment,
                    position * num_elements,
                    num_elements,
                    dtype,
                )
            )
        return parts

    def _tensor(self, name: str, shape: tuple[int, ...] | None) -> tuple[TensorEntry, str]:
        """A tensor of this layer and its dtype name; checks the shape if one is given."""
        full_name = f"{self.prefix}.{name}"
        entry = self.index.tensors.get(full_name)
        if entry is None:
            some_file = self.index.file_of(f"{self.prefix}.{min(self.names)}")
            raise CheckpointError(
                f"{some_file.parent}: tensor {full_name} is missing from the checkpoint. "
                "Download the model again, or check that config.json belongs to it."
            )
        if entry.dtype not in DTYPE_NAMES:
            raise UnsupportedModelError(
                f"{self.index.file_of(full_name)}: tensor {full_name} has dtype {entry.dtype}. "
                "ExpertFlow reads experts in float32, bfloat16 and float16; use a checkpoint that "
                "is not quantized."
            )
        if shape is not None:
            self._check_shape(name, entry, shape)
        return entry, DTYPE_NAMES[entry.dtype]

    def _check_shape(self, name: str, entry: TensorEntry, shape: tuple[int, ...]) -> None:
        if entry.shape != shape:
            full_name = f"{self.prefix}.{name}"
            raise CheckpointError(
                f"{self.index.file_of(full_name)}: tensor {full_name} has shape "
                f"{list(entry.shape)}, and config.json asks for {list(shape)}. Does config.json "
                "belong to these weights?"
            )

    def _refuse_count(self, found: int, file: object) -> None:
        place = file or self.index.file_of(f"{self.prefix}.{min(self.names)}").parent
        raise CheckpointError(
            f"{place}: config.json says {self.skeleton.num_experts} experts a layer, and the "
            f"checkpoint has {found} in {self.prefix}. Does config.json belong to these weights?"
        )

    def _refuse_others(self, used: set[str]) -> None:
        """Tensors beside the expected ones would change what an expert computes."""
        if others := self.names - used:
            full_name = f"{self.prefix}.{min(others)}"
            raise UnsupportedModelError(
                f"{self.index.file_of(full_name)}: tensor {full_name} is not part of a plain "
                f"expert ({len(others)} such tensors in this layer); ExpertFlow would ignore it. "
                "Is the checkpoint quantized?"
            )
