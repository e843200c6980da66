"""How many slots an expert cache gets, and whether all of it fits into memory."""

from __future__ import annotations

from dataclasses import dataclass

from ._core import POLICIES, min_slots
from .memory import AvailableMemory, check_ram, format_size, parse_size


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a model's memory depends on, whatever its cache."""

    path: str
    num_layers: int  # with experts
    num_experts: int  # per layer
    top_k: int
    slot_bytes: int  # of one expert in the cache
    pool_bytes_per_expert: int  # in a RAM pool
    other_bytes: int  # everything that is not an expert

    @property
    def num_experts_total(self) -> int:
        """Experts of all layers together."""
        return self.num_layers * self.num_experts

    @property
    def expert_bytes_total(self) -> int:
        """All experts in slots."""
        return self.num_experts_total * self.slot_bytes

    @property
    def pool_bytes(self) -> int:
        """All experts in a RAM pool."""
        return self.num_experts_total * self.pool_bytes_per_expert


@dataclass(frozen=True, slots=True)
class CacheSize:
    """A cache of a model, and the memory of both, in bytes."""

    model: ModelSizes
    num_slots: int
    pool: str
    policy: str
    scope: str
    on_cuda: bool = False  # slots and the rest of the model are on a GPU

    @property
    def slot_bytes(self) -> int:
        """All slots."""
        return self.num_slots * self.model.slot_bytes

    @property
    def cache_bytes(self) -> int:
        """Slots in RAM; none if the RAM pool itself serves as the cache.

        It does when every expert has a slot and the policy lets it stay there.
        """
        is_whole = self.num_slots == self.model.num_experts_total
        if self.on_cuda or (self.pool == "ram" and is_whole and self.policy != "on_demand"):
            return 0
        return self.slot_bytes

    @property
    def pool_bytes(self) -> int:
        """RAM pool; none if the pool is the checkpoint's files."""
        return self.model.pool_bytes if self.pool == "ram" else 0

    @property
    def needed_bytes(self) -> int:
        """RAM for all of the model; what goes to a GPU passes through it."""
        return self.cache_bytes + self.pool_bytes + self.model.other_bytes


def size_cache(
    model: ModelSizes,
    expert_cache: str | float | int,
    pool: str,
    policy: str,
    scope: str,
    *,
    on_cuda: bool = False,
) -> CacheSize:
    """Turn `expert_cache` into slots; more than all experts is the same as "100%".

    Raises ValueError for a size that does not parse or is smaller than the smallest legal one, and
    for a policy or scope that does not exist.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is unknown. Use one of: {', '.join(POLICIES)}.")
    slot_bytes, top_k = model.slot_bytes, model.top_k
    asked_bytes = parse_size(expert_cache, model.expert_bytes_total, "expert_cache")
    num_slots = min(asked_bytes // slot_bytes, model.num_experts_total)
    smallest = int(min_slots(model.num_layers, top_k, scope))
    if num_slots < smallest:
        each = " for each layer" if scope == "layer" else ""
        raise ValueError(
            f"expert_cache={expert_cache!r} holds {num_slots} experts of {format_size(slot_bytes)}"
            f" each. A token needs {top_k} experts at once, so the smallest legal cache "
            f"is {smallest} experts{each and f' ({top_k}{each})'}: "
            f"{smallest * slot_bytes} bytes ({format_size(smallest * slot_bytes)})."
        )
    return CacheSize(model, _whole_layers(num_slots, model, scope), pool, policy, scope, on_cuda)


def largest_cache_bytes(
    model: ModelSizes, pool: str, available_bytes: int, scope: str = "global"
) -> int:
    """The largest legal cache that fits beside `pool` and the rest of the model; 0 if none does.

    Not counted is a cache of all experts that is the RAM pool itself: it fits wherever that does.
    """
    spare_bytes = available_bytes - model.other_bytes - (model.pool_bytes if pool == "ram" else 0)
    num_slots = min(max(spare_bytes, 0) // model.slot_bytes, model.num_experts_total)
    if num_slots < min_slots(model.num_layers, model.top_k, scope):
        return 0
    return _whole_layers(num_slots, model, scope) * model.slot_bytes


def _whole_layers(num_slots: int, model: ModelSizes, scope: str) -> int:
    """With scope "layer", every layer gets the same number of slots."""
    return num_slots - num_slots % model.num_layers if scope == "layer" else num_slots


def check_cache_fits(size: CacheSize, available: AvailableMemory, *, pool_is_fixed: bool) -> None:
    """Raise MemoryError, saying what would fit, if pool, cache and the rest do not."""
    if size.needed_bytes <= available.num_bytes:
        return
    model, options = size.model, []
    fits_pool = model.pool_bytes + model.other_bytes <= available.num_bytes
    if size.pool == "ram" and not size.on_cuda and size.policy != "on_demand" and fits_pool:
        options.append('expert_cache="100%" (then the pool itself is the cache)')
    pools = dict.fromkeys([size.pool] if pool_is_fixed else [size.pool, "file"])
    if size.on_cuda:
        pools.pop("ram", None)  # no smaller cache makes room for it
        options += ['pool="file"'] if "file" in pools else []
        pools = {}
    for pool in pools:
        num_bytes = largest_cache_bytes(model, pool, available.num_bytes, size.scope)
        if num_bytes:
            options.append(
                f'pool="{pool}" with expert_cache up to {num_bytes} ({format_size(num_bytes)})'
            )
    advice = f"What would fit: {', or '.join(options)}." if options else "No cache would fit."
    parts = [f"{format_size(size.pool_bytes)} expert pool"] if size.pool_bytes else []
    parts += [f"{format_size(size.cache_bytes)} expert cache"] if size.cache_bytes else []
    parts.append(f"{format_size(model.other_bytes)} for the rest of the model")
    check_ram(
        size.needed_bytes,
        available,
        f"{model.path} ({', '.join(parts)})",
        f"{advice} ram_limit= of from_pretrained overrides the amount that is taken to be "
        "available.",
    )


def check_cuda_cache_fits(size: CacheSize, free_bytes: int, device: object) -> None:
    """Raise MemoryError, saying what would fit, if slots and the rest do not fit on the GPU."""
    model = size.model
    if size.slot_bytes + model.other_bytes <= free_bytes:
        return
    num_slots = max(free_bytes - model.other_bytes, 0) // model.slot_bytes
    num_slots = _whole_layers(min(num_slots, size.num_slots), model, size.scope)
    fits = num_slots >= min_slots(model.num_layers, model.top_k, size.scope)
    num_bytes = num_slots * model.slot_bytes
    advice = f"expert_cache up to {num_bytes} ({format_size(num_bytes)})" if fits else "no cache"
    raise MemoryError(
        f"{model.path} needs {format_size(size.slot_bytes)} for the expert cache and "
        f"{format_size(model.other_bytes)} for the rest of the model on {device}, where "
        f"{format_size(free_bytes)} are free. What would fit: {advice}."
    )
