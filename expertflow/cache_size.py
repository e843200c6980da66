"""How many slots an expert cache gets, and whether all of it fits into memory."""

from __future__ import annotations

from dataclasses import dataclass

from ._core import min_slots
from .memory import AvailableMemory, check_ram, format_size, parse_size
from .model_info import OpenedModel

POLICIES = ("decayed_frequency", "lru", "two_level_lru", "on_demand")


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The memory of a model: its pool, its cache and the rest, in bytes."""

    num_slots: int
    cache_bytes: int
    pool_bytes: int  # 0 for the file pool
    other_bytes: int

    @property
    def needed_bytes(self) -> int:
        """All of it."""
        return self.cache_bytes + self.pool_bytes + self.other_bytes


def size_cache(
    model: OpenedModel, expert_cache: str | float | int, pool: str, policy: str, scope: str
) -> CacheSize:
    """Turn `expert_cache` into slots; more than all experts is the same as "100%".

    Raises ValueError for a size that does not parse or is smaller than the smallest legal one, and
    for a policy or scope that does not exist.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is unknown. Use one of: {', '.join(POLICIES)}.")
    skeleton, slot_bytes = model.skeleton, int(model.layout.slot_bytes)
    num_layers, num_experts_total = len(skeleton.moe_layers), skeleton.num_experts_total
    num_slots = count_slots(
        expert_cache, slot_bytes, num_layers, skeleton.num_experts, skeleton.top_k, scope
    )
    return CacheSize(
        num_slots=num_slots,
        cache_bytes=slots_memory(num_slots, num_experts_total, slot_bytes, pool == "ram", policy),
        pool_bytes=model.pool_bytes if pool == "ram" else 0,
        other_bytes=model.other_bytes,
    )


def slots_memory(
    num_slots: int, num_experts_total: int, slot_bytes: int, ram_pool: bool, policy: str
) -> int:
    """Bytes that slots take; none if the RAM pool itself serves as the cache.

    It does when every expert has a slot and the policy lets it stay there.
    """
    aliases_pool = ram_pool and num_slots == num_experts_total and policy != "on_demand"
    return 0 if aliases_pool else num_slots * slot_bytes


def count_slots(
    expert_cache: str | float | int,
    slot_bytes: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    scope: str,
) -> int:
    """Turn the size of a cache into its slots; more than all experts is the same as "100%".

    Raises ValueError for a size that does not parse or is smaller than the smallest legal one.
    """
    num_experts_total = num_layers * num_experts
    asked_bytes = parse_size(expert_cache, num_experts_total * slot_bytes, "expert_cache")
    num_slots = min(asked_bytes // slot_bytes, num_experts_total)
    smallest = int(min_slots(num_layers, top_k, scope))
    if num_slots < smallest:
        each = " for each layer" if scope == "layer" else ""
        raise ValueError(
            f"expert_cache={expert_cache!r} holds {num_slots} experts of {format_size(slot_bytes)}"
            f" each. A token needs {top_k} experts at once, so the smallest legal cache "
            f"is {smallest} experts{each and f' ({top_k}{each})'}: "
            f"{smallest * slot_bytes} bytes ({format_size(smallest * slot_bytes)})."
        )
    if scope == "layer":
        num_slots -= num_slots % num_layers  # every layer gets the same number
    return num_slots


def check_cache_fits(model: OpenedModel, size: CacheSize, available: AvailableMemory) -> None:
    """Raise MemoryError, saying what would fit, if pool, cache and the rest do not."""
    slot_bytes, top_k = int(model.layout.slot_bytes), model.skeleton.top_k
    spare_bytes = available.num_bytes - model.other_bytes
    options = []
    if size.pool_bytes and size.cache_bytes and model.pool_bytes <= spare_bytes:
        options.append('expert_cache="100%" (then the pool itself is the cache)')
    largest_bytes = min(spare_bytes // slot_bytes * slot_bytes, model.expert_bytes_total)
    if largest_bytes >= top_k * slot_bytes:
        options.append(f'pool="file" with expert_cache up to {format_size(largest_bytes)}')
    advice = f"What would fit: {', or '.join(options)}." if options else "No cache would fit."
    parts = [f"{format_size(size.pool_bytes)} expert pool"] if size.pool_bytes else []
    parts += [f"{format_size(size.cache_bytes)} expert cache"] if size.cache_bytes else []
    parts.append(f"{format_size(size.other_bytes)} for the rest of the model")
    check_ram(
        size.needed_bytes,
        available,
        f"{model.files.path} ({', '.join(parts)})",
        f"{advice} ram_limit= overrides the amount that is taken to be available.",
    )
