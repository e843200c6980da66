"""Biased routing of transformers models: hooks on the routers that change ids and weights.

All our families have routers that return (logits, weights, ids). The weights of changed ids follow
the family's own rule, from the logits as they are: the bias decides who, not how much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import UnsupportedModelError
from .experts import StreamedExperts
from .routers import router_beside

# (router, logits [tokens, experts], ids [tokens, k]) -> weights [tokens, k]
_WeightRule = Callable[[Any, Tensor, Tensor], Tensor]


def _softmax(router: Any, logits: Tensor, ids: Tensor) -> Tensor:
    weights = logits.softmax(-1, dtype=torch.float32).gather(-1, ids)
    if getattr(router, "norm_topk_prob", True):  # Mixtral does so always
        weights = weights / weights.sum(-1, keepdim=True)
    return weights


def _scaled_softmax(router: Any, logits: Tensor, ids: Tensor) -> Tensor:
    scores = logits.softmax(-1, dtype=torch.float32)
    return scores.gather(-1, ids) * router.routed_scaling_factor


def _sigmoid(router: Any, logits: Tensor, ids: Tensor) -> Tensor:
    weights = logits.sigmoid().gather(-1, ids)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * router.routed_scaling_factor


def _softmax_of_chosen(router: Any, logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(-1, ids).softmax(-1, dtype=logits.dtype)


_WEIGHT_RULES: dict[str, _WeightRule] = {
    "mixtral": _softmax,
    "qwen2_moe": _softmax,
    "qwen3_moe": _softmax,
    "olmoe": _softmax,
    "deepseek_v2": _scaled_softmax,
    "deepseek_v3": _sigmoid,
    "glm4_moe": _sigmoid,
    "gpt_oss": _softmax_of_chosen,
}


def bias_routers(model: Any) -> list[RemovableHandle]:
    """Have the routers of a streamed model ask the `biased_router` of the cache.

    Raises what `check_routers` raises.
    """
    rule, routers = check_routers(model)
    return [
        router.register_forward_hook(_reroute_hook(experts, rule)) for router, experts in routers
    ]


def check_routers(model: Any) -> tuple[_WeightRule, list[tuple[Any, StreamedExperts]]]:
    """Return how a model's routers weigh experts, and the routers with their experts.

    Raises UnsupportedModelError where routes that are changed would not be weighed as the router
    does.
    """
    family = model.config.model_type
    rule = _WEIGHT_RULES.get(family)
    if rule is None:
        raise UnsupportedModelError(
            f"ExpertFlow does not know how {family} models weigh experts, so it cannot change "
            'their routes: use routing="exact"'
        )
    routers = [
        (router_beside(model, name), experts)
        for name, experts in model.named_modules()
        if isinstance(experts, StreamedExperts)
    ]
    for router, _ in routers:
        _check_rule(family, router, rule)
    return rule, routers


def _reroute_hook(experts: StreamedExperts, rule: _WeightRule) -> Callable[..., Any]:
    @torch.compiler.disable
    def reroute(router: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, ids = output
        cache = experts.cache
        if cache is None or cache.biased_router is None:
            return None
        changed = cache.biased_router.reroute(cache, experts.layer_index, logits, ids)
        if changed is None:
            return None
        is_changed = (changed != ids).any(-1, keepdim=True)
        reweighed = rule(router, logits, changed).to(weights.dtype)
        return logits, torch.where(is_changed, reweighed, weights), changed

    return reroute


@torch.no_grad()
def _check_rule(family: str, router: Any, rule: _WeightRule) -> None:
    """Refuse a router of another kind, such as one of a later version of transformers."""
    weight: Tensor = router.weight
    probe = torch.linspace(-1, 1, 4 * weight.shape[1], device=weight.device)
    # Not called as a module: an earlier hook would change what the router returns.
    logits, weights, ids = router.forward(probe.view(4, -1).to(weight.dtype))
    found = rule(router, logits, ids)
    if not torch.allclose(found.float(), weights.float(), rtol=0.02):  # bfloat16 rounds so much
        raise UnsupportedModelError(
            f"the routers of this {family} model weigh experts in another way than ExpertFlow "
            'knows, so their routes cannot be changed: use routing="exact"'
        )
