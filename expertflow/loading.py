"""`from_pretrained`: a transformers model, ready to generate, whose experts are streamed.

The order matters: everything that can be refused is refused from config.json and headers, then
memory is checked, then transformers builds and reads all but the experts, and the experts come
last, straight from the checkpoint's files into the pool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from . import _core
from ._core import CheckpointSource, ExpertSource, RamPool
from .biased_hooks import check_routers
from .biased_routing import BiasedRouting, check_routing
from .build_info import build_info
from .cache import NUM_FILE_READERS, ExpertCache
from .cache_size import CacheSize, check_cache_fits, check_cuda_cache_fits, size_cache
from .errors import CheckpointError
from .experts import StreamedExperts, refuse_loading_experts
from .families import transformers_lock
from .memory import available_memory
from .model_info import OpenedModel, open_model
from .predictor import MAX_DISTANCE, ExpertPredictor, predictor_bytes
from .streamed_model import streamed_model_class
from .unsupported import chosen_device, refuse_arguments

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
    device: str | int | torch.device = "cpu",
    pin_memory: bool | None = None,
    dtype: str | torch.dtype | None = "auto",
    ram_limit: str | float | int | None = None,
    num_threads: int | None = None,
    prefetch: str | int = False,
    routing: str | BiasedRouting = "exact",
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
        policy: which expert leaves the cache: "decayed_frequency", "predicted_need", "lru",
            "two_level_lru", or "on_demand", which keeps none.
        cache_scope: "global", or "layer" for the same number of slots in every layer.
        pool: where the other experts wait: "ram", or "file" to read them from the checkpoint.
        device: "cpu", or "cuda": the model and the expert cache are on the GPU, the pool is not.
        pin_memory: on CUDA, page-lock the RAM pool, so that the GPU copies from it directly. None
            does so and goes on without, slower and with a warning, where the system refuses; True
            raises CudaError then; False never does.
        dtype: "auto" or None (the checkpoint's), float32, bfloat16 or float16; experts are
            converted while they are read.
        ram_limit: memory to assume to be available, instead of what system and cgroup say.
        num_threads: threads that fetch experts.
        prefetch: "auto" to foresee which experts the next layers will need, learning while the
            model runs, and to fetch those early that are worth it, as far ahead as measured times
            and bandwidth call for; 1 to 8 for so many layers ahead, the top-k experts of each;
            False to fetch only what is needed.
        routing: "exact", or a `BiasedRouting` to change a part of the routes in favour of experts
            in the cache. That changes what the model says: see docs/cache-aware-routing.md.
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
    device_map = arguments.pop("device_map", None)
    refuse_arguments(device_map, arguments)
    chosen = chosen_device(device, device_map)
    if pool not in _POOLS:
        raise ValueError(f"pool={pool!r} is unknown. Use one of: {', '.join(_POOLS)}.")
    if num_threads is not None and (not isinstance(num_threads, int) or num_threads < 1):
        raise ValueError(f"num_threads={num_threads!r} is not a positive number.")
    _check_prefetch(prefetch)
    check_routing(routing)
    streamed, loading_info = load_opened_model(
        open_model(path, dtype, arguments),
        expert_cache=expert_cache,
        policy=policy,
        cache_scope=cache_scope,
        pool=pool,
        device=chosen,
        pin_memory=pin_memory,
        ram_limit=ram_limit,
        num_threads=num_threads,
        prefetch=prefetch,
        routing=routing,
        progress=progress,
    )
    return (streamed, loading_info) if arguments.get("output_loading_info") else streamed


def load_opened_model(
    model: OpenedModel,
    *,
    expert_cache: str | float | int,
    policy: str,
    cache_scope: str,
    pool: str,
    device: torch.device,
    ram_limit: str | float | int | None,
    progress: bool,
    pin_memory: bool | None = None,
    num_threads: int | None = None,
    prefetch: str | int = False,
    routing: str | BiasedRouting = "exact",
) -> tuple[Any, dict[str, Any]]:
    """The second half of `from_pretrained`: check sizes, then read.

    Returns the model and transformers' loading information.
    """
    on_cuda = device.type == "cuda"
    size = size_cache(model.sizes, expert_cache, pool, policy, cache_scope, on_cuda=on_cuda)
    with_predictor = _with_predictor(size, model.config) if prefetch else size
    check_cache_fits(with_predictor, available_memory(ram_limit), pool_is_fixed=False)
    if on_cuda:
        torch.cuda.empty_cache()
        check_cuda_cache_fits(size, torch.cuda.mem_get_info(device)[0], device)

    streamed, loading_info = _load_without_experts(model, progress)
    streamed.to(device)
    experts = _experts_modules(streamed, model)
    if isinstance(routing, BiasedRouting):
        check_routers(streamed)
    try:
        source = _open_source(model, size, device, pin_memory, num_threads, progress)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they would keep the pool alive
        raise
    streamed.expert_cache = ExpertCache(
        source,
        model.layout,
        dict(model.skeleton.segment_shapes),
        len(experts),
        model.skeleton.num_experts,
        model.skeleton.top_k,
        num_slots=size.num_slots,
        policy=size.policy,
        scope=size.scope,
        num_threads=num_threads,
        device=device,
        mlp_hidden=experts[0].mlp_hidden() if on_cuda else None,
    )
    for layer_index, module in enumerate(experts):
        module.bind(streamed.expert_cache, layer_index)
    refuse_loading_experts(streamed)
    streamed.sizes, streamed.ram_limit, streamed.pool = with_predictor.model, ram_limit, pool
    streamed.requires_grad_(False)
    if prefetch:
        streamed.expert_cache.set_horizon(prefetch)
        streamed.set_predictor(ExpertPredictor.for_model(streamed))
    streamed.set_routing(routing)
    return streamed, loading_info


def _check_prefetch(prefetch: str | int) -> None:
    if prefetch is False or prefetch == "auto":
        return
    is_number = isinstance(prefetch, int) and prefetch is not True
    if not is_number or not 1 <= int(prefetch) <= MAX_DISTANCE:
        raise ValueError(
            f'prefetch={prefetch!r} is unknown. Use "auto", a number of layers from 1 to '
            f"{MAX_DISTANCE}, or False."
        )


def _with_predictor(size: CacheSize, config: Any) -> CacheSize:
    """Count a predictor, which is in RAM and on a GPU, among the rest of the model."""
    model, text = size.model, config.get_text_config()
    num_bytes = predictor_bytes(
        model.num_layers, model.num_experts, text.hidden_size, MAX_DISTANCE, text.vocab_size
    )
    counted = dataclasses.replace(model, other_bytes=model.other_bytes + num_bytes)
    return dataclasses.replace(size, model=counted)


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


def _experts_modules(streamed: Any, model: OpenedModel) -> list[StreamedExperts]:
    """The experts modules of the MoE layers, in order."""
    modules = dict(streamed.named_modules())
    experts = [modules[name] for name in model.skeleton.moe_layers]
    assert all(isinstance(module, StreamedExperts) for module in experts)
    return experts


def _open_source(
    model: OpenedModel,
    size: CacheSize,
    device: torch.device,
    pin_memory: bool | None,
    num_threads: int | None,
    progress: bool,
) -> ExpertSource:
    """Open the checkpoint's files as a pool, or fill one in RAM from them."""
    extents = model.experts.extents(model.layout.segments)
    source = CheckpointSource([str(file) for file in model.index.files], model.layout, extents)
    if size.pool == "file":
        return source
    num_experts, on_cuda = model.skeleton.num_experts_total, device.type == "cuda"
    numa_node = build_info()["gpus"][device.index]["numa_node"] if on_cuda else None
    pool = RamPool(model.layout, num_experts, -1 if numa_node is None else numa_node)
    threads = num_threads or max(NUM_FILE_READERS, min(len(os.sched_getaffinity(0)), 16))
    if not on_cuda or pin_memory is False:
        _fill(pool.start_fill(source, threads), progress)
        return pool
    pinned = _core.PinnedPool(pool, device.index, is_required=bool(pin_memory))
    _fill(pinned.start_fill(pool, source, threads), progress)
    if pinned.failure is not None:
        logger.warning(
            "The expert pool could not be page-locked (%s). It is copied through a staging buffer "
            "instead, which is slower; pin_memory=True makes this an error.",
            pinned.failure,
        )
    return pinned


def _fill(fill: _core.PoolFill, progress: bool) -> None:
    """Read all experts into RAM in parallel; an interrupt or an error ends the threads."""
    from tqdm.auto import tqdm

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
        del fill
        raise
