"""Where each tensor of a safetensors checkpoint lies, read and checked from the headers alone.

The weights themselves are read elsewhere, by offset. So everything that a broken download or a
wrong file can do is found here, before anything is read, and named: file, tensor, what to do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CheckpointError

_HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_GET_IT_AGAIN = "Copy or download the file again."


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: the file it is in, its first byte there, and what it holds."""

    file_index: int
    offset: int  # absolute, in bytes
    num_bytes: int
    dtype: str  # as safetensors spells it: "F32", "BF16", "F8_E4M3", ...
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """All tensors of a checkpoint by name."""

    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor `name`."""
        return self.files[self.tensors[name].file_index]


def read_checkpoint_index(weights_file: Path) -> CheckpointIndex:
    """Index a checkpoint from its `*.safetensors` file or its `*.safetensors.index.json`.

    Reads headers only. Raises FileNotFoundError for a file that is not there and CheckpointError
    for one whose content is wrong; both name the file.
    """
    if weights_file.suffix != ".json":
        return CheckpointIndex((weights_file,), _read_tensor_entries(weights_file, 0))
    weight_map = _read_weight_map(weights_file)
    files = tuple(weights_file.parent / name for name in sorted(set(weight_map.values())))
    _check_shards_exist(files, weights_file)
    tensors: dict[str, TensorEntry] = {}
    for file_index, file in enumerate(files):
        for name, entry in _read_tensor_entries(file, file_index).items():
            if name in tensors:
                first = files[tensors[name].file_index]
                raise CheckpointError(f"{file}: tensor {name} is also in {first}. {_GET_IT_AGAIN}")
            tensors[name] = entry
    _check_weight_map(weight_map, tensors, files, weights_file)
    return CheckpointIndex(files, tensors)


def _read_weight_map(index_file: Path) -> dict[str, str]:
    """Tensor name to shard file name, as the index has it."""
    try:
        content = json.loads(index_file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{index_file}: not valid JSON ({error}). {_GET_IT_AGAIN}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index_file}: has no "weight_map". {_GET_IT_AGAIN}')
    for name, shard in weight_map.items():
        inside = isinstance(shard, str) and shard and not PurePosixPath(shard).is_absolute()
        if not inside or ".." in PurePosixPath(shard).parts:
            raise CheckpointError(
                f"{index_file}: tensor {name} is said to be in {shard!r}, "
                "which is not a file inside the model directory."
            )
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index_file}: shard {shard} is not a .safetensors file.")
    return weight_map


def _check_shards_exist(files: tuple[Path, ...], index_file: Path) -> None:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index_file.parent}: {len(missing)} of {len(files)} shards missing: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''} "
            f"(named in {index_file.name}). Download the model again, or finish the download."
        )


def _check_weight_map(
    weight_map: Mapping[str, str],
    tensors: Mapping[str, TensorEntry],
    files: tuple[Path, ...],
    index_file: Path,
) -> None:
    """Every tensor that the index promises is in the shard that it names."""
    for name, shard in weight_map.items():
        entry = tensors.get(name)
        if entry is None or files[entry.file_index] != index_file.parent / shard:
            raise CheckpointError(
                f"{index_file.parent / shard}: tensor {name} is not in it, although "
                f"{index_file.name} says so. Index and shards are not from the same download; "
                "download the model again."
            )


def _read_tensor_entries(file: Path, file_index: int) -> dict[str, TensorEntry]:
    """Parse and check the header of one safetensors file."""
    header, data_start, file_bytes = _read_header(file)
    entries = {
        name: _parse_entry(file, file_index, data_start, name, description)
        for name, description in header.items()
        if name != "__metadata__"
    }
    _check_data(file, data_start, file_bytes, entries)
    return entries


def _read_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header, the offset of the data behind it, and the size of the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file. Download the model again.")
    with file.open("rb") as stream:
        file_bytes = os.fstat(stream.fileno()).st_size
        prefix = stream.read(_HEADER_LENGTH_BYTES)
        if prefix == b"version ":
            raise CheckpointError(
                f"{file}: a Git LFS pointer, not the weights. Run `git lfs pull` in its directory."
            )
        header_bytes = int.from_bytes(prefix, "little")
        data_start = _HEADER_LENGTH_BYTES + header_bytes
        if len(prefix) < _HEADER_LENGTH_BYTES or header_bytes > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{file}: not a safetensors file, its header would be {header_bytes} bytes long. "
                f"{_GET_IT_AGAIN}"
            )
        if data_start > file_bytes:
            raise CheckpointError(
                f"{file}: truncated, the header needs {data_start} bytes and the file has "
                f"{file_bytes}. {_GET_IT_AGAIN}"
            )
        text = stream.read(header_bytes)
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{file}: the safetensors header is not valid JSON ({error}). {_GET_IT_AGAIN}"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the safetensors header is not a table. {_GET_IT_AGAIN}")
    return header, data_start, file_bytes


def _parse_entry(
    file: Path, file_index: int, data_start: int, name: str, description: Any
) -> TensorEntry:
    """One header entry; its byte count must be what dtype and shape say."""
    try:
        dtype = description["dtype"]
        shape = tuple(description["shape"])
        begin, end = description["data_offsets"]
        numbers = (*shape, begin, end)
        valid = all(type(number) is int and number >= 0 for number in numbers)
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid or not isinstance(dtype, str):
        raise CheckpointError(f"{file}: the header entry of tensor {name} is not valid.")
    if dtype not in _DTYPE_BITS:
        raise CheckpointError(f"{file}: tensor {name} has the unknown dtype {dtype!r}.")
    expected_bytes = prod(shape) * _DTYPE_BITS[dtype] // 8
    if end - begin != expected_bytes:
        raise CheckpointError(
            f"{file}: tensor {name} of shape {list(shape)} and dtype {dtype} needs "
            f"{expected_bytes} bytes, but the header gives it {end - begin}. {_GET_IT_AGAIN}"
        )
    return TensorEntry(file_index, data_start + begin, expected_bytes, dtype, shape)


def _check_data(
    file: Path, data_start: int, file_bytes: int, entries: Mapping[str, TensorEntry]
) -> None:
    """The tensors fill the rest of the file without gap and overlap, as the format demands."""
    end, previous = data_start, "the header"
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)
    ):
        if entry.offset < end:
            raise CheckpointError(
                f"{file}: tensor {name} overlaps {previous} by {end - entry.offset} bytes. "
                f"{_GET_IT_AGAIN}"
            )
        if entry.offset > end:
            raise CheckpointError(
                f"{file}: {entry.offset - end} bytes between {previous} and tensor {name} belong "
                f"to no tensor. {_GET_IT_AGAIN}"
            )
        end, previous = entry.offset + entry.num_bytes, f"tensor {name}"
        if end > file_bytes:
            raise CheckpointError(
                f"{file}: truncated, tensor {name} ends at byte {end} and the file has "
                f"{file_bytes}. {_GET_IT_AGAIN}"
            )
    if end < file_bytes:
        raise CheckpointError(
            f"{file}: {file_bytes - end} bytes after the last tensor. {_GET_IT_AGAIN}"
        )
