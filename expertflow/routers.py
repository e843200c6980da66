"""The routers of a transformers MoE model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import UnsupportedModelError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Routers:
    """All routers of a model; contracts of the fields are in csrc/core/predictor."""

    weights: FloatArray | Sequence[Tensor]  # [layers, experts, hidden], or each layer's own
    top_k: int
    biases: FloatArray | None = None  # [layers, experts], of the logits
    corrections: FloatArray | None = None  # [layers, experts], of sigmoid scores
    is_sigmoid: bool = False
    num_groups: int = 1
    top_groups: int = 1

    def stacked_weights(self) -> FloatArray:
        """Return `weights` as one array: a copy, if they are each layer's own."""
        return self.weights if isinstance(self.weights, np.ndarray) else _stack(self.weights)


def find_routers(model: nn.Module) -> Routers:
    """Read the routers of a transformers model of one of our families, streamed or not.

    Their weights are the model's own tensors.

    Raises UnsupportedModelError where the router beside the experts is not one that we know.
    """
    routers = [
        router_beside(model, name)
        for name, _ in model.named_modules()
        if name.endswith(".mlp.experts")
    ]
    if not routers:
        raise UnsupportedModelError("the model has no layer with experts")
    first: Any = routers[0]
    corrections = [getattr(router, "e_score_correction_bias", None) for router in routers]
    has_groups = getattr(first, "topk_method", "group_limited_greedy") == "group_limited_greedy"
    num_groups = (getattr(first, "num_group", None) or 1) if has_groups else 1
    return Routers(
        weights=[router.weight for router in routers],
        top_k=int(first.top_k),
        biases=_stack_or_none([getattr(router, "bias", None) for router in routers]),
        corrections=_stack_or_none(corrections),
        is_sigmoid=corrections[0] is not None,
        num_groups=int(num_groups),
        top_groups=int(first.topk_group or 1) if num_groups > 1 else 1,
    )


def router_beside(model: nn.Module, experts_name: str) -> Any:
    """The router that decides about the experts module of that name."""
    block = model.get_submodule(experts_name.rpartition(".")[0])
    for name in ("gate", "router"):
        router = getattr(block, name, None)
        if isinstance(getattr(router, "weight", None), Tensor) and hasattr(router, "top_k"):
            return router
    raise UnsupportedModelError(
        f"there is no router that ExpertFlow knows beside {experts_name}: cannot predict or "
        'change its routes. Load the model with prefetch=False and routing="exact".'
    )


def _stack(tensors: Sequence[Tensor]) -> FloatArray:
    stacked: FloatArray = torch.stack([t.detach().float().cpu() for t in tensors]).numpy()
    return stacked


def _stack_or_none(tensors: list[Any]) -> FloatArray | None:
    return None if tensors[0] is None else _stack(tensors)
