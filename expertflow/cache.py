"""The expert cache as Python sees it."""

import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _core, ops
from .slots import ExpertWeights, Slots

if TYPE_CHECKING:
    from .biased_routing import BiasedRouter
    from .experts import StreamedExperts

# (tokens [n, H], weights of one expert) -> [n, H]
ExpertMlp = Callable[[Tensor, ExpertWeights], Tensor]

# On the CPU a demand waits for no more than one chunk a thread. On CUDA it waits for two of a
# prefetch, and smaller ones do not reach the link's bandwidth.
_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 5 << 20}
# Threads that read files. They sleep while the disk works, so they may be more than the cores: that
# many chunks keep a disk busy (cold, 8 threads read 1.5 times as fast as 2; 16 no faster).
NUM_FILE_READERS = 8
_open_caches: "weakref.WeakValueDictionary[int, ExpertCache]" = weakref.WeakValueDictionary()


class ExpertCache:
    """A few experts of all MoE layers in slots, the others in `source` until a layer needs them.

    Args:
        source: a `_core.RamPool` or a `_core.CheckpointSource`.
        layout: the tensors of one expert.
        segment_shapes: their shapes, by role.
        num_layers: MoE layers; layers are counted over these only.
        num_experts: in each layer.
        top_k: experts a token is routed to.
        num_slots: experts the cache holds.
        policy: "decayed_frequency", "predicted_need", "lru", "two_level_lru", or "on_demand", which
            keeps nothing.
        scope: "global", or "layer" for an equal share of the slots for each layer.
        decay: of use frequencies, per token.
        num_threads: that copy experts; default: 8 that read files, or the cores there are, at most
            4, that copy from RAM.
        device: where the slots are and the experts are computed, "cpu" or "cuda:0".
        mlp_hidden: on CUDA, the hidden size, if the experts are what `ops.compute` computes:
            MLPs with SiLU gates, or with biases as gpt-oss has them.

    Raises:
        ValueError: options that do not fit together, e.g. fewer slots than a layer's top-k.
        MemoryError: the system refuses the memory.
    """

    def __init__(
        self,
        source: "_core.ExpertSource",
        layout: "_core.ExpertLayout",
        segment_shapes: dict[str, tuple[int, ...]],
        num_layers: int,
        num_experts: int,
        top_k: int,
        *,
        num_slots: int,
        policy: str = "decayed_frequency",
        scope: str = "global",
        decay: float = 0.98,
        num_threads: int | None = None,
        device: str | torch.device = "cpu",
        mlp_hidden: int | None = None,
    ) -> None:
        if num_threads is None:
            reads_files = isinstance(source, _core.CheckpointSource)
            num_threads = NUM_FILE_READERS if reads_files else min(4, len(os.sched_getaffinity(0)))
        self.device = _with_index(torch.device(device))
        options: dict[str, Any] = {
            "num_layers": num_layers,
            "num_experts": num_experts,
            "top_k": top_k,
            "num_slots": num_slots,
            "policy": policy,
            "scope": scope,
            "decay": decay,
            "chunk_bytes": _CHUNK_BYTES[self.device.type],
            "num_threads": num_threads,
        }
        self._core: _core.ExpertCache | _core.CudaExpertCache
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # torch's unused blocks are no use to the slots
            options |= {"device": self.device.index, "mlp_hidden": mlp_hidden}
            self._core = _core.CudaExpertCache(source, layout, **options)
        else:
            self._core = _core.ExpertCache(source, layout, **options)
        self.source = source
        self.layout = layout
        self.segment_shapes = segment_shapes
        self.slots = Slots(self._core, layout, segment_shapes, num_slots, self.device)
        self.handle = torch.tensor([self._core.handle, 0])
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_slots = num_slots
        self.slot_bytes: int = layout.slot_bytes
        self.dtype: torch.dtype = getattr(torch, layout.segments[0][1])
        self.policy = policy
        self.scope = scope
        self.decay = decay
        self.num_threads = num_threads
        self.mlp_hidden = mlp_hidden
        self.chosen_horizon: str | int = "auto"
        # For compiled graphs, which know a layer by its number only.
        self.layers: weakref.WeakValueDictionary[int, StreamedExperts] = (
            weakref.WeakValueDictionary()
        )
        # Held while a layer is computed: its slots must not change hands.
        self.lock = threading.RLock()
        self._is_forked = False
        # Changes routes in favour of what this cache holds; None: routing is exact.
        self.biased_router: BiasedRouter | None = None
        _open_caches[self._core.handle] = self

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], top_k: int, *, num_slots: int, **options: Any
    ) -> "ExpertCache":
        """Return a cache over a RAM pool with a copy of `tensors`, for models of your own.

        Args:
            tensors: by role, each [layers, experts, ...], e.g. "gate_up_proj" and "down_proj".
            top_k: experts a token is routed to.
            num_slots: experts the cache holds.
            **options: as for the class.
        """
        leading = {tuple(tensor.shape[:2]) for tensor in tensors.values()}
        if len(leading) != 1 or any(tensor.dim() < 3 for tensor in tensors.values()):
            raise ValueError("all tensors must be [layers, experts, ...], with the same of both")
        num_layers, num_experts = leading.pop()
        shapes = {role: tuple(tensor.shape[2:]) for role, tensor in tensors.items()}
        layout = _core.ExpertLayout(
            [
                (role, str(tensor.dtype).removeprefix("torch."), math.prod(shapes[role]))
                for role, tensor in tensors.items()
            ]
        )
        num_experts_total = num_layers * num_experts
        pool = _core.RamPool(layout, num_experts_total)
        for expert in range(num_experts_total):
            memory = torch.from_numpy(pool.expert_memory(expert))
            for role, _, offset, num_bytes in layout.segments:
                tensor = tensors[role][divmod(expert, num_experts)].contiguous()
                memory[offset : offset + num_bytes] = tensor.flatten().view(torch.uint8)
        source: _core.ExpertSource = pool
        device = _with_index(torch.device(options.get("device", "cpu")))
        if device.type == "cuda":
            source = pinned = _core.PinnedPool(pool, device.index, is_required=False)
            pinned.pin(0, num_experts_total)
        return cls(
            source, layout, shapes, num_layers, num_experts, top_k, num_slots=num_slots, **options
        )

    def resized(self, num_slots: int, policy: str, scope: str) -> "ExpertCache":
        """Return an empty cache of another size or policy over the same source."""
        cache = ExpertCache(
            self.source,
            self.layout,
            self.segment_shapes,
            self.num_layers,
            self.num_experts,
            self.top_k,
            num_slots=num_slots,
            policy=policy,
            scope=scope,
            decay=self.decay,
            num_threads=self.num_threads,
            device=self.device,
            mlp_hidden=self.mlp_hidden,
        )
        cache.set_horizon(self.chosen_horizon)
        cache.biased_router = self.biased_router
        return cache

    def close(self) -> None:
        """Free the slots of a CUDA cache now, instead of when nothing refers to it any more.

        Afterwards it is of use only to be `resized`.
        """
        del self.slots, self._core

    @staticmethod
    def of_handle(handle: Tensor) -> "ExpertCache":
        """Return the cache that an op was given."""
        return _open_caches[int(handle[0])]

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return self.num_slots * self.slot_bytes

    @property
    def bandwidth_bytes_per_second(self) -> float:
        """What the source was last seen to deliver; 0 before the first copy."""
        return self._core.bandwidth_bytes_per_second

    def check_process(self) -> None:
        """Raise RuntimeError in a child that was forked after the cache was made."""
        if self._is_forked:
            raise RuntimeError(
                "this expert cache was made before a fork and cannot be used in the child: load "
                "the model in the process that runs it"
            )

    def prefetch(self, layer: int, expert_ids: Tensor, distance: int = 1) -> None:
        """Fetch what `layer` will need `distance` MoE layers from now; see `ops.prefetch`."""
        ids = expert_ids.to("cpu", torch.int64).contiguous()
        with self.lock:
            ops.prefetch(self.handle, ids, layer, distance)

    def set_horizon(self, horizon: str | int) -> None:
        """Choose how many layers ahead `begin_prefetch` looks.

        "auto", as at first: what measured bandwidth, compute time and the fate of earlier
        prefetches call for, down to none where prefetching does not pay. Or a number from 0 to 8:
        so many, and the top-k experts of each. The policy "on_demand" prefetches nothing.

        Raises:
            ValueError: neither.
        """
        if horizon == "auto":
            self._core.set_horizon(_core.AUTO_HORIZON)
        elif type(horizon) is int and 0 <= horizon <= _core.MAX_HORIZON:
            self._core.set_horizon(horizon)
        else:
            raise ValueError(
                f'horizon={horizon!r} is neither "auto" nor 0 to {_core.MAX_HORIZON} layers'
            )
        self.chosen_horizon = horizon

    @property
    def horizon(self) -> int:
        """How many layers ahead is prefetched; 0 where that has not been found to pay."""
        return self._core.horizon

    def begin_token(self, num_tokens: int) -> int:
        """Return how many of the first layers to foresee for a pass over that many rows.

        To be called once their embeddings are known; `prefetch_predicted` then takes layer 0 as the
        first one ahead. May be more than `horizon`, and 0: nothing is to be foreseen now, as for
        `begin_prefetch`.
        """
        with self.lock:
            return self._core.begin_token(num_tokens)

    def begin_prefetch(self) -> int:
        """Return how many layers ahead to foresee, for the layer that was planned last.

        Takes in what was measured up to that plan. May be more than `horizon`: what prefetching
        would bring is tried on paper first, and from time to time again. 0: nothing is to be
        foreseen now, as for prompts of more than 16 tokens, before bandwidth and compute time are
        known, and while a trial rests.
        """
        with self.lock:
            return self._core.begin_prefetch()

    def prefetch_predicted(self, need: NDArray[np.float32]) -> int:
        """Fetch what is worth it of what later layers will probably need.

        After `begin_prefetch` or `begin_token`. With the adaptive horizon it replaces what an
        earlier call has posted and is not under way yet: that is taken back unless it is worth it
        by this `need` too.

        Args:
            need: [distances, experts]: row d - 1 has the probability that the MoE layer d after
                the one planned last needs each expert. Past the last layer those of the next token
                follow, layer 0 first. Rows beyond the horizon are ignored.

        Returns:
            How many experts were posted: the more probable ones first, with a fixed horizon those
            of nearer layers.
        """
        with self.lock:
            return self._core.prefetch_predicted(need)

    def residents(self, layer: int) -> NDArray[np.uint8]:
        """[experts]: 1 if the expert of `layer` is in a slot, or on its way to one."""
        return self._core.residents(layer)

    def statistics(self) -> dict[str, Any]:
        """Return counts since the last reset: totals, and under "layers" those of each MoE layer.

        hits, late_hits (a prefetch was still under way), misses: experts needed, each once per
        forward pass of its layer; demand_bytes, prefetch_bytes, wasted_prefetch_bytes; evictions;
        stall_us, the time that computation waited for experts. In total only: prefetches_used, and
        of these prefetch_hits, which were there in time; prefetches_wasted, evicted without a use;
        horizon, how many layers ahead is prefetched now. routes that biased routing could have
        changed, and changed_routes, are 0 if routing is exact.
        """
        statistics = self._core.statistics()
        counts = [(0, 0)] * self.num_layers
        if self.biased_router is not None:
            counts = self.biased_router.counts()
        for layer, (routes, changed) in zip(statistics["layers"], counts, strict=True):
            layer |= {"routes": routes, "changed_routes": changed}
        totals = zip(("routes", "changed_routes"), map(sum, zip(*counts, strict=True)), strict=True)
        return statistics | dict(totals)

    def reset_statistics(self) -> None:
        """Start counting anew."""
        self._core.reset_statistics()
        if self.biased_router is not None:
            self.biased_router.reset_counts()


def _with_index(device: torch.device) -> torch.device:
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _disown_caches() -> None:
    """In a forked child, where neither the threads that copy exist nor who holds a lock."""
    for cache in list(_open_caches.values()):
        cache.lock = threading.RLock()
        cache._is_forked = True


os.register_at_fork(after_in_child=_disown_caches)


def hit_rate(statistics: dict[str, Any]) -> float:
    """Return the share of needed experts that were in the cache in time; NaN if none was needed."""
    needed = statistics["hits"] + statistics["late_hits"] + statistics["misses"]
    return statistics["hits"] / needed if needed else math.nan
