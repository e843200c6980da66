"""The model families that ExpertFlow runs, and how their checkpoints name the experts.

A family is one row of `FAMILIES`. Everything else about a model (which layers have experts, how
many, which shapes) is asked of transformers itself, by building the model on the meta device.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import UnsupportedModelError

# Held while transformers is imported, and builds or loads a model. Meanwhile it replaces methods of
# its own classes and torch's default dtype, and we the class of the experts: two threads at once
# would leave them replaced for good.
transformers_lock = threading.RLock()

# Parameter of an experts module -> the checkpoint's per-expert tensors that are stacked to make
# it, e.g. rows of gate_proj and then rows of up_proj.
_GATE_UP_DOWN = {
    "gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
    "down_proj": ("down_proj.weight",),
}
_W1_W3_W2 = {"gate_up_proj": ("w1.weight", "w3.weight"), "down_proj": ("w2.weight",)}


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of MoE model.

    Every family may come *fused*, one tensor per layer and parameter of the experts module
    ("...mlp.experts.gate_up_proj"), and if `per_expert` is given also *per expert*
    ("...mlp.experts.7.gate_proj.weight").
    """

    model_type: str  # of config.json
    per_expert: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _GATE_UP_DOWN)
    block_name: str = "mlp"  # what checkpoints call the module that transformers calls "mlp"


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("mixtral", _W1_W3_W2, block_name="block_sparse_moe"),
        Family("qwen2_moe"),
        Family("qwen3_moe"),
        Family("olmoe"),
        Family("deepseek_v2"),
        Family("deepseek_v3"),
        Family("glm4_moe"),
        Family("gpt_oss", per_expert={}),
    )
}


def find_family(config: Mapping[str, Any], path: str) -> Family:
    """The family of a config.json. Raises UnsupportedModelError for every other model."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is not None:
        return family
    supported = f"Supported model types: {', '.join(FAMILIES)}."
    if _mentions_experts(config):
        raise UnsupportedModelError(
            f"{path}: ExpertFlow does not know MoE models of type {model_type!r}. {supported}"
        )
    raise UnsupportedModelError(
        f"{path}: a model of type {model_type!r} has no experts, so there is nothing to stream; "
        f"load it with transformers. {supported}"
    )


def _mentions_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of a type that we do not know looks like one of an MoE model."""
    return "moe" in str(config.get("model_type")) or any(
        "expert" in str(key)
        or "moe" in str(key)
        or (isinstance(value, Mapping) and _mentions_experts(value))
        for key, value in config.items()
    )


@dataclass(frozen=True, slots=True)
class ModelSkeleton:
    """What transformers builds from a config: modules and shapes, without any weights."""

    model_class: type[Any]
    experts_class: type[Any]  # in transformers: the module that holds all experts of a layer
    base_model_prefix: str  # "model": checkpoints of the base model leave it out
    num_layers: int  # all of them, dense ones included
    moe_layers: tuple[str, ...]  # module names of the experts modules; the index is the MoE layer
    num_experts: int  # per layer
    top_k: int
    segment_shapes: Mapping[str, tuple[int, ...]]  # of one expert: {"gate_up_proj": (2I, H), ...}
    other_shapes: Mapping[str, tuple[int, ...]]  # of every parameter that is not an expert's

    @property
    def num_experts_total(self) -> int:
        """Experts of all layers together."""
        return len(self.moe_layers) * self.num_experts


def build_skeleton(config: Any, family: Family, path: str) -> ModelSkeleton:
    """Build the model on the meta device and read modules and shapes off it.

    `config` is a transformers configuration of this family. Takes milliseconds and no memory.
    Raises UnsupportedModelError if no layer has experts, or layers differ.
    """
    import torch

    with transformers_lock:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    experts = {
        name: module for name, module in model.named_modules() if name.endswith(".mlp.experts")
    }
    if not experts:
        raise UnsupportedModelError(
            f"{path}: this {family.model_type} model has no layer with experts, so there is "
            "nothing to stream; load it with transformers."
        )
    stacked_shapes = {
        name: {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}
        for name, module in experts.items()
    }
    first_name, first = next(iter(stacked_shapes.items()))
    for name, shapes in stacked_shapes.items():
        if shapes != first:
            raise UnsupportedModelError(
                f"{path}: the experts of {name} have other shapes than those of {first_name}; "
                "ExpertFlow needs the same in every layer."
            )
    num_experts = next(iter(first.values()))[0]
    return ModelSkeleton(
        model_class=type(model),
        experts_class=type(experts[first_name]),
        base_model_prefix=model.base_model_prefix,
        num_layers=config.num_hidden_layers,
        moe_layers=tuple(experts),
        num_experts=num_experts,
        top_k=_top_k(config, num_experts, path),
        segment_shapes={key: shape[1:] for key, shape in first.items()},
        other_shapes={
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if name.rpartition(".")[0] not in experts
        },
    )


def _top_k(config: Any, num_experts: int, path: str) -> int:
    top_k = getattr(config, "num_experts_per_tok", None)
    if not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise UnsupportedModelError(
            f"{path}: num_experts_per_tok is {top_k!r} in config.json; with {num_experts} experts "
            f"a layer it must be between 1 and {num_experts}."
        )
    return top_k
