"""What a model is, read from its config.json and the headers of its safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ._core import ExpertLayout, min_slots
from .cache_size import ModelSizes, largest_cache_bytes
from .checkpoint import CheckpointIndex, read_checkpoint_index
from .errors import CheckpointError, UnsupportedModelError
from .expert_tensors import DTYPE_NAMES, DTYPES, ExpertTensors, locate_experts
from .families import Family, ModelSkeleton, build_skeleton, find_family, transformers_lock
from .hub import ModelFiles, find_config_file, find_model_files, pop_hub_arguments
from .memory import available_memory
from .unsupported import GGUF_REFUSAL, refuse_quantized


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that was found, understood and checked, with none of its weights read."""

    files: ModelFiles
    config: Any  # transformers' configuration
    model_arguments: dict[str, Any]  # arguments that are neither for the Hub nor for the config
    family: Family
    skeleton: ModelSkeleton
    index: CheckpointIndex
    experts: ExpertTensors
    dtype: torch.dtype  # that the model and its experts will have
    layout: ExpertLayout  # of one expert in that dtype

    @property
    def sizes(self) -> ModelSizes:
        """What its memory depends on."""
        num_other_elements = sum(map(prod, self.skeleton.other_shapes.values()))
        return ModelSizes(
            path=self.files.path,
            num_layers=len(self.skeleton.moe_layers),
            num_experts=self.skeleton.num_experts,
            top_k=self.skeleton.top_k,
            slot_bytes=self.layout.slot_bytes,
            pool_bytes_per_expert=self.layout.pool_bytes_per_expert,
            other_bytes=num_other_elements * self.dtype.itemsize,
        )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What `expertflow info` shows. All sizes in bytes, of the dtype the model would run in."""

    path: str
    model_type: str
    dtype: str
    num_layers: int
    num_moe_layers: int
    num_experts: int  # per MoE layer
    top_k: int
    expert_bytes: int  # of one expert
    expert_bytes_total: int
    smallest_cache_bytes: int  # top_k experts
    smallest_layer_cache_bytes: int  # with cache_scope="layer": top_k experts for every layer
    other_bytes: int
    ram_available_bytes: int
    ram_source: str  # what limits the memory
    fits_ram_pool: bool  # pool="ram" fits; a cache of 100 % is then the pool itself
    largest_ram_pool_cache_bytes: int  # that fits beside it, of any other share; 0 if none does
    largest_cache_bytes: int  # that fits with pool="file"; 0 if none does


def model_info(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = "auto",
    ram_limit: str | float | int | None = None,
    **transformers_kwargs: Any,
) -> ModelInfo:
    """Describe a model without loading it; takes a path or a Hub id as `from_pretrained` does.

    A Hub id is downloaded with its weights first, unless the Hub cache has it.
    Raises what `from_pretrained` raises for a model that cannot be run.
    """
    model = open_model(path, dtype, transformers_kwargs)
    sizes, memory = model.sizes, available_memory(ram_limit)
    smallest, smallest_layer = (
        min_slots(sizes.num_layers, sizes.top_k, scope) * sizes.slot_bytes
        for scope in ("global", "layer")
    )
    return ModelInfo(
        path=sizes.path,
        model_type=model.family.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        num_layers=model.skeleton.num_layers,
        num_moe_layers=sizes.num_layers,
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        expert_bytes=sizes.slot_bytes,
        expert_bytes_total=sizes.expert_bytes_total,
        smallest_cache_bytes=smallest,
        smallest_layer_cache_bytes=smallest_layer,
        other_bytes=sizes.other_bytes,
        ram_available_bytes=memory.num_bytes,
        ram_source=memory.source,
        fits_ram_pool=sizes.pool_bytes + sizes.other_bytes <= memory.num_bytes,
        largest_ram_pool_cache_bytes=largest_cache_bytes(sizes, "ram", memory.num_bytes),
        largest_cache_bytes=largest_cache_bytes(sizes, "file", memory.num_bytes),
    )


def open_model(
    path: str | os.PathLike[str], dtype: str | torch.dtype | None, arguments: Mapping[str, Any]
) -> OpenedModel:
    """Find a model, check that ExpertFlow can run it and locate its experts.

    `arguments` are transformers' own, those of `from_pretrained`. Reads config.json and headers.
    """
    with transformers_lock:
        from transformers import AutoConfig

    left = dict(arguments)
    hub_arguments = pop_hub_arguments(left)
    variant, config = left.pop("variant", None), left.pop("config", None)
    config_file = find_config_file(path, hub_arguments)
    description = _read_config(os.fspath(path), config_file, config, hub_arguments)
    family = find_family(description, os.fspath(path))
    refuse_quantized(description, os.fspath(path))
    files = find_model_files(
        path,
        config_file,
        hub_arguments,
        weights_name=description.get("transformers_weights"),
        variant=variant,
    )
    if config is None:
        config, left = AutoConfig.from_pretrained(
            files.path, return_unused_kwargs=True, **files.hub_arguments, **left
        )
    skeleton = build_skeleton(config, family, files.path)
    index = read_checkpoint_index(files.weights_file)
    experts = locate_experts(index, family, skeleton, files.path)  # first: it knows their number
    _check_other_tensors(index, family, skeleton)
    model_dtype = _model_dtype(dtype, config, experts)
    return OpenedModel(
        files=files,
        config=config,
        model_arguments=left | ({"variant": variant} if variant else {}),
        family=family,
        skeleton=skeleton,
        index=index,
        experts=experts,
        dtype=model_dtype,
        layout=_expert_layout(skeleton, model_dtype),
    )


def _read_config(
    path: str, config_file: Path | None, config: Any, hub_arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of config.json, or of the configuration that the caller passed instead."""
    if config is not None:
        return dict(config.to_dict())
    if config_file is None:
        return _refuse_without_config(Path(path, hub_arguments.get("subfolder") or ""), path)
    try:
        content = json.loads(config_file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{config_file}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{config_file}: not a table of settings.")
    return content


def _refuse_without_config(directory: Path, path: str) -> dict[str, Any]:
    files = {file.name for file in directory.iterdir()} if directory.is_dir() else set()
    if any(name.endswith(".gguf") for name in files):
        raise UnsupportedModelError(f"{path}: {GGUF_REFUSAL}")
    if "adapter_config.json" in files:
        raise UnsupportedModelError(
            f"{path}: an adapter, not a model. Load its base model with expertflow.from_pretrained "
            "and attach the adapter with PeftModel.from_pretrained(model, path)."
        )
    raise FileNotFoundError(f"{path}: no config.json there, so this is not a model directory.")


def _check_other_tensors(index: CheckpointIndex, family: Family, skeleton: ModelSkeleton) -> None:
    """Tensors outside the experts must have the dtype and shape that transformers expects.

    It would convert quantized numbers without their scales, and reports shapes without a name.
    """
    prefix = f"{skeleton.base_model_prefix}."
    for name, entry in index.tensors.items():
        in_module = name.replace(f".{family.block_name}.", ".mlp.")
        shape = skeleton.other_shapes.get(
            in_module, skeleton.other_shapes.get(f"{prefix}{in_module}")
        )
        if shape is None:
            continue  # transformers reports what it does not know
        if entry.dtype not in DTYPE_NAMES and entry.dtype != "F64":
            raise UnsupportedModelError(
                f"{index.file_of(name)}: tensor {name} has dtype {entry.dtype}. ExpertFlow reads "
                "float32, bfloat16 and float16; use a checkpoint that is not quantized."
            )
        if entry.shape != shape:
            raise CheckpointError(
                f"{index.file_of(name)}: tensor {name} has shape {list(entry.shape)}, and "
                f"config.json asks for {list(shape)}. Does config.json belong to these weights?"
            )


def _model_dtype(
    dtype: str | torch.dtype | None, config: Any, experts: ExpertTensors
) -> torch.dtype:
    """The dtype to run in; "auto" is that of config.json or else of the checkpoint's experts."""
    wanted = dtype
    if dtype in (None, "auto"):
        wanted = getattr(config, "dtype", None) or experts.dtype
    name = str(wanted).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype={wanted!r} is not supported. Use {', '.join(DTYPES)} or auto.")
    return DTYPES[name]


def _expert_layout(skeleton: ModelSkeleton, dtype: torch.dtype) -> ExpertLayout:
    name = str(dtype).removeprefix("torch.")
    return ExpertLayout(
        [(segment, name, prod(shape)) for segment, shape in skeleton.segment_shapes.items()]
    )
