"""What tests do with a streamed model: change its cache, run it, compare bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertflow._core import POLICIES as POLICIES

SCOPES = ("global", "layer")
POOLS = ("ram", "file")
DTYPES = (torch.float32, torch.bfloat16)
CACHE_SIZES = ("smallest", "smallest+1", "25%", "50%", "all-1", "all")


@dataclass(frozen=True)
class CacheOptions:
    """A cache for `use`; "smallest+1" and "all-1" mean a slot more or less (in every layer)."""

    size: str = "all"
    policy: str = "decayed_frequency"
    scope: str = "global"

    def __str__(self) -> str:
        return f"{self.size}-{self.policy}-{self.scope}"

    def num_slots(self, num_layers: int, num_experts: int, top_k: int) -> int:
        if self.scope == "global":
            num_layers, num_experts = 1, num_layers * num_experts
        sizes = {
            "smallest": top_k,
            "smallest+1": top_k + 1,
            "25%": max(top_k, num_experts // 4),
            "50%": num_experts // 2,
            "all-1": num_experts - 1,
            "all": num_experts,
        }
        return num_layers * sizes[self.size]


EVERYTHING_CACHED = CacheOptions()
SMALLEST = CacheOptions("smallest")


def use(model: Any, options: CacheOptions) -> Any:
    """Give `model` a new, empty cache, and return the model."""
    old = model.expert_cache
    num_slots = options.num_slots(old.num_layers, old.num_experts, old.top_k)
    num_bytes = num_slots * old.slot_bytes
    model.set_expert_cache(num_bytes, policy=options.policy, cache_scope=options.scope)
    assert model.expert_cache.num_slots == num_slots
    return model


def token_ids(*lengths: int, vocab_size: int = 96, seed: int = 0) -> dict[str, Tensor]:
    """Random prompts of the given lengths as a batch, padded on the left with token 0."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(2, vocab_size, (len(lengths), longest), generator=generator)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    return model(**batch, **kwargs).logits


def generate(model: Any, batch: dict[str, Tensor], new_tokens: int, **kwargs: Any) -> Tensor:
    """Prompts with exactly `new_tokens` new tokens; greedy unless `kwargs` say otherwise."""
    kwargs = {"do_sample": False, "min_new_tokens": new_tokens} | kwargs
    return model.generate(**batch, max_new_tokens=new_tokens, **kwargs)


def same_bits(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> bool:
    """Whether two sequences of tensors are equal bit by bit. Not if there is a NaN."""
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
