"""Routing that prefers experts in the cache: opt-in, and lossy.

The arithmetic is csrc/core/biased_router.h; docs/cache-aware-routing.md says where it comes from,
what it gains and what it costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import _core, ops
from .routers import Routers

if TYPE_CHECKING:
    from .cache import ExpertCache

# Passes of more rows are prompts: they need most experts anyway, and what they are routed to shapes
# everything that is generated from them.
MAX_ROWS = ops.MAX_COMPUTE_TOKENS


@dataclass(frozen=True, slots=True)
class BiasedRouting:
    """How far routing may give way to the cache: an argument of `from_pretrained`.

    Args:
        budget: the largest share of routes (tokens * layers * k) that may be changed. It is kept
            after every token.
        strength: the largest difference between the score of a missing expert and that of a
            resident one that takes its place, in mean ranges of the layer's scores.
        keep_top: how many of each token's best experts are never changed.

    Raises:
        ValueError: a value is out of range.
    """

    budget: float = 0.05
    strength: float = 0.5
    keep_top: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.budget <= 1:
            raise ValueError(f"budget={self.budget!r} is not a share of routes, from 0 to 1")
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength={self.strength!r} is not a number of at least 0")
        if not isinstance(self.keep_top, int) or self.keep_top < 0:
            raise ValueError(f"keep_top={self.keep_top!r} is not a number of experts")


def check_routing(routing: str | BiasedRouting) -> None:
    """Raise ValueError for what is no value of `routing`."""
    if routing != "exact" and not isinstance(routing, BiasedRouting):
        raise ValueError(
            f'routing={routing!r} is unknown. Use "exact" or expertflow.BiasedRouting(budget=...).'
        )


class BiasedRouter:
    """Changes the routes of one model; `ExpertCache.biased_router`.

    Args:
        routers: of all MoE layers; their weights are not used.
        routing: how far it may go.
    """

    def __init__(self, routers: Routers, routing: BiasedRouting) -> None:
        self.routing = routing
        corrections = routers.corrections
        self._core = _core.BiasedRouter(
            num_layers=len(routers.weights),
            num_experts=len(routers.weights[0]),
            top_k=routers.top_k,
            is_sigmoid=routers.is_sigmoid,
            num_groups=routers.num_groups,
            top_groups=routers.top_groups,
            corrections=np.empty(0, np.float32) if corrections is None else corrections,
            strength=routing.strength,
            keep_top=routing.keep_top,
            budget=routing.budget,
        )

    def reroute(
        self, cache: ExpertCache, layer: int, logits: Tensor, expert_ids: Tensor
    ) -> Tensor | None:
        """Return `expert_ids` [tokens, k] in favour of what `cache` holds, or None for no change.

        A resident expert takes the place of the one that it stands in for. On CUDA the call blocks
        until the ids are computed.

        Args:
            cache: of the model.
            layer: MoE layer.
            logits: [tokens, experts], of the router.
            expert_ids: [tokens, k], what the family chooses from them.
        """
        if not 0 < len(expert_ids) <= MAX_ROWS:
            return None
        scores = logits.detach().float().cpu().numpy()
        wanted = expert_ids.to("cpu", torch.int64).numpy()
        with cache.lock:  # no other pass takes slots between the look at residents and the choice
            changed_ids, num_changed = self._core.reroute(
                layer, scores, cache.residents(layer), wanted
            )
        if num_changed == 0:
            return None
        if expert_ids.device.type != "cuda":
            return torch.from_numpy(changed_ids).to(expert_ids.dtype)
        uploaded = ops.upload(changed_ids.ravel().tolist(), expert_ids.device)
        return uploaded.view_as(expert_ids).to(expert_ids.dtype)

    def counts(self) -> list[tuple[int, int]]:
        """For each layer since the last reset: routes that could be changed, and that were."""
        return self._core.counts()

    def reset_counts(self) -> None:
        """Start counting anew, with a budget of which nothing is saved up."""
        self._core.reset_counts()
