"""One MoE layer from end to end, without transformers: the flow of ExpertFlow in a page."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cache import ExpertCache
from .experts import compute_experts
from .foreseeing import Predictor, begin_foreseeing, prefetch_foreseen
from .slots import ExpertWeights


class MoELayer(nn.Module):
    """Router, predictor hook and streamed experts of one layer.

        hidden state ──► router ──► expert ids, weights ──► plan: hits, misses and their slots
              └──► predictor ──► prefetch for later layers      └──► experts ──► weighted sum

    The experts are gated MLPs, down(act(gate(x)) * up(x)), with `gate_up_proj` [2I, H] (the gate's
    rows first) and `down_proj` [H, I] in the slots of `cache`.

    Args:
        router_weight: [experts, hidden].
        cache: holds the experts of this layer and of the others of the model. Set its
            `biased_router` to have routes changed in favour of what it holds.
        layer: which of the cache's MoE layers this is.
        activation: of the gate; default SiLU.
        normalize: scale the weights of a token's experts to a sum of 1.
        predictor: foresees what later layers need: an `ExpertPredictor`, or see `Predictor`; None
            prefetches nothing.
    """

    def __init__(
        self,
        router_weight: Tensor,
        cache: ExpertCache,
        layer: int,
        *,
        activation: Callable[[Tensor], Tensor] = functional.silu,
        normalize: bool = True,
        predictor: Predictor | None = None,
    ) -> None:
        super().__init__()
        if router_weight.shape[0] != cache.num_experts:
            raise ValueError(
                f"the router of layer {layer} scores {router_weight.shape[0]} experts, "
                f"the cache has {cache.num_experts}"
            )
        if not 0 <= layer < cache.num_layers:
            raise ValueError(f"layer {layer} is not one of the cache's {cache.num_layers} layers")
        if cache.mlp_hidden is not None and activation is not functional.silu:
            raise ValueError(
                "the cache's mlp_hidden asks for kernels that compute SiLU gates: make the cache "
                "without it for another activation"
            )
        self.router = nn.Parameter(router_weight, requires_grad=False)
        self.cache = cache
        self.layer = layer
        self.activation = activation
        self.normalize = normalize
        self.predictor = predictor

    def route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] -> weights and ids of each token's experts, both [tokens, k]."""
        logits = functional.linear(hidden_states.to(self.router.dtype), self.router)
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        weights, expert_ids = probabilities.topk(self.cache.top_k, dim=-1)
        if self.cache.biased_router is not None:
            changed = self.cache.biased_router.reroute(self.cache, self.layer, logits, expert_ids)
            if changed is not None:
                expert_ids, weights = changed, probabilities.gather(-1, changed)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, expert_ids

    def expert_mlp(self, tokens: Tensor, weights: ExpertWeights) -> Tensor:
        """One expert: [n, hidden] -> [n, hidden]."""
        gate, up = functional.linear(tokens, weights["gate_up_proj"]).chunk(2, dim=-1)
        return functional.linear(self.activation(gate) * up, weights["down_proj"])

    @torch.no_grad()
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden], unless routes are biased the same bits with any cache."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, expert_ids = self.route(tokens)
        with self.cache.lock:
            begin_foreseeing(self.predictor, self.layer, tokens)
            output = compute_experts(
                self.cache,
                self.layer,
                tokens,
                expert_ids,
                weights,
                self.expert_mlp,
                on_planned=lambda: prefetch_foreseen(
                    self.predictor, self.cache, self.layer, tokens
                ),
            )
        return output.view_as(hidden_states)
