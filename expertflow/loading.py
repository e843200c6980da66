"""`from_pretrained`: a transformers model, ready to generate, whose experts are streamed.

The order matters: everything that can be refused is refused from config.json and headers, then
memory is checked, then transformers builds and reads all but the experts, and the experts come
last, straight from the checkpoint's files into the pool.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch

from ._core import CheckpointSource, RamPool
from .cache import ExpertCache
from .cache_size import CacheSize, check_cache_fits, size_cache
from .errors import CheckpointError
from .experts import StreamedExperts
from .families import transformers_lock
from .memory import available_memory
from .model_info import OpenedModel, open_model
from .streamed_model import streamed_model_class
from .unsupported import refuse_arguments

logger = logging.getLogger(__name__)

_POOLS = ("ram", "file")
_POLL_SECONDS = 0.1


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    expert_cache: str | float | int = "25%",
    policy: str = "decayed_frequency",
    cache_scope: str = "global",
    pool: str = "ram",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = "auto",
    ram_limit: str | float | int | None = None,
    num_threads: int | None = None,
    progress: bool = True,
    **transformers_kwargs: Any,
) -> Any:
    """Load an MoE model for `generate` without ever holding all of its experts in the cache.

    Several threads may call it at once, but meanwhile no thread should build or load a model by
    other means.

    Args:
        path: a directory, or a Hub id with `revision`, `cache_dir`, `token`, `local_files_only`
            and `subfolder` as in transformers.
        expert_cache: memory for experts: "25%" or 0.25 of all experts, "8GiB", or bytes as int.
            At least the experts that one token needs in one layer.
        policy: which expert leaves the cache: "decayed_frequency", "lru", "two_level_lru", or
            "on_demand", which keeps none.
        cache_scope: "global", or "layer" for the same number of slots in every layer.
        pool: where the other experts wait: "ram", or "file" to read them from the checkpoint.
        device: "cpu".
        dtype: "auto" or None (the checkpoint's), float32, bfloat16 or float16; experts are
            converted while they are read.
        ram_limit: memory to assume to be available, instead of what system and cgroup say.
        num_threads: threads that fetch experts.
        progress: show progress bars.
        **transformers_kwargs: as for `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The transformers model, in eval mode; its `expert_cache` is the ExpertCache. With
        `output_loading_info=True`, a pair of it and transformers' loading information.

    Raises:
        UnsupportedModelError: the model, or an argument, is outside what can be run exactly.
        CheckpointError: a checkpoint file is damaged or disagrees with config.json.
        FileNotFoundError: the directory, config.json, the weights or a shard are missing.
        MemoryError: pool, cache and the rest do not fit; raised before anything is read.
        ValueError: an argument has no meaning, or the cache is smaller than the smallest legal.
    """
    arguments = dict(transformers_kwargs)
    if "torch_dtype" in arguments:  # transformers' older name
        dtype = arguments.pop("torch_dtype") or dtype
    refuse_arguments(device, arguments.pop("device_map", None), arguments)
    if pool not in _POOLS:
        raise ValueError(f"pool={pool!r} is unknown. Use one of: {', '.join(_POOLS)}.")
    if num_threads is not None and (not isinstance(num_threads, int) or num_threads < 1):
        raise ValueError(f"num_threads={num_threads!r} is not a positive number.")
    model = open_model(path, dtype, arguments)
    size = size_cache(model.sizes, expert_cache, pool, policy, cache_scope)
    check_cache_fits(size, available_memory(ram_limit), pool_is_fixed=False)

    streamed, loading_info = _load_without_experts(model, progress)
    streamed.expert_cache = _open_cache(model, size, num_threads, progress)
    _bind_experts(streamed, model)
    streamed.sizes, streamed.ram_limit = model.sizes, ram_limit
    streamed.requires_grad_(False)
    return (streamed, loading_info) if arguments.get("output_loading_info") else streamed


def _load_without_experts(model: OpenedModel, progress: bool) -> tuple[Any, dict[str, Any]]:
    """Have transformers build the model and read everything that is not an expert."""
    arguments = dict(model.model_arguments)
    ignore_mismatched = arguments.pop("ignore_mismatched_sizes", False)
    arguments.pop("output_loading_info", None)
    model_class = streamed_model_class(model.skeleton, model.files.path)
    with transformers_lock, _progress_bars(progress):
        streamed, info = model_class.from_pretrained(
            model.files.path,
            config=model.config,
            dtype=model.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named below
            **model.files.hub_arguments,
            **arguments,
        )
    _check_loading_info(info, model, ignore_mismatched)
    # They may lie in the mapped file, and whoever cut that would kill the process.
    for tensor in (*streamed.parameters(), *streamed.buffers()):
        tensor.data = tensor.data.clone()
    return streamed, info


def _check_loading_info(info: dict[str, Any], model: OpenedModel, ignore_mismatched: bool) -> None:
    """Refuse what transformers would fill with random numbers."""
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{model.files.path}: {len(missing)} tensors are missing from the checkpoint, "
            f"for example {missing[0]}. Download the model again."
        )
    if info["mismatched_keys"] and not ignore_mismatched:
        name, found, expected = min(info["mismatched_keys"])
        raise CheckpointError(
            f"{model.files.path}: tensor {name} has shape {list(found)}, and config.json asks "
            f"for {list(expected)}. Does config.json belong to these weights?"
        )


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Within, transformers shows its progress bars only if `shown`."""
    from transformers.utils import logging as transformers_logging

    if shown or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def _open_cache(
    model: OpenedModel, size: CacheSize, num_threads: int | None, progress: bool
) -> ExpertCache:
    """Fill or open the pool and put the cache before it."""
    layout, skeleton = model.layout, model.skeleton
    extents = model.experts.extents(layout.segments)
    source = CheckpointSource([str(file) for file in model.index.files], layout, extents)
    return ExpertCache(
        _filled_pool(model, source, num_threads, progress) if size.pool == "ram" else source,
        layout,
        dict(skeleton.segment_shapes),
        len(skeleton.moe_layers),
        skeleton.num_experts,
        skeleton.top_k,
        num_slots=size.num_slots,
        policy=size.policy,
        scope=size.scope,
        num_threads=num_threads,
    )


def _filled_pool(
    model: OpenedModel, source: CheckpointSource, num_threads: int | None, progress: bool
) -> RamPool:
    """Read all experts into RAM in parallel; an interrupt or an error frees the memory."""
    from tqdm.auto import tqdm

    pool = RamPool(model.layout, model.skeleton.num_experts_total)
    fill = pool.start_fill(source, num_threads or min(len(os.sched_getaffinity(0)), 8))
    try:
        with tqdm(
            total=fill.bytes_total,
            desc="Loading experts",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=not progress,
        ) as bar:
            done = False
            while not done:
                done = fill.wait(_POLL_SECONDS)
                bar.update(fill.bytes_done - bar.n)
    except BaseException:
        fill.cancel()
        with contextlib.suppress(Exception):
            while not fill.wait(_POLL_SECONDS):
                pass
        # The traceback keeps this frame, and with it the pool, alive.
        del fill, pool
        raise
    return pool


def _bind_experts(streamed: Any, model: OpenedModel) -> None:
    """Tell every experts module its MoE layer."""
    modules = dict(streamed.named_modules())
    for layer_index, name in enumerate(model.skeleton.moe_layers):
        experts = modules[name]
        assert isinstance(experts, StreamedExperts), f"{name} is {type(experts).__name__}"
        experts.bind(streamed.expert_cache, layer_index)
