"""Small random checkpoints of every family, for tests.

Shapes are small but not trivial: several MoE layers, eight experts, top-2 or top-3, dense layers
and shared experts where the family has them, expert groups for DeepSeek and GLM4. The weights are
large enough that different tokens take different experts and that the logits differ clearly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 96

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}

_MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8}
_MLA |= {"qk_rope_head_dim": 8, "v_head_dim": 8}

FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 24},
    "qwen2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
        "num_hidden_layers": 6,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "olmoe": {"num_experts": 8, "intermediate_size": 16, "num_hidden_layers": 3},
    "deepseek_v2": {
        **_MLA,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "moe_intermediate_size": 20,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {
        **_MLA,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 20,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "use_qk_norm": True,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
FAMILIES = tuple(FAMILY_CONFIGS)
ALWAYS_FUSED = ("gpt_oss",)  # has no per-expert layout


def make_config(family: str, **overrides: Any) -> Any:
    """The tiny configuration of a family; `overrides` are attributes of its config class."""
    return AutoConfig.for_model(family, **(_COMMON | FAMILY_CONFIGS[family] | overrides))


def make_model(
    family: str, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A plain transformers model with random weights, the same ones in every call."""
    config = make_config(family, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(sum(map(ord, family)))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _randomize(name, tensor, generator)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and "inv_freq" not in name and "correction_bias" not in name:
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def _randomize(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Fill one tensor: norms around 1, biases and sinks small, routers wide, matrices by fan-in."""
    if "inv_freq" in name or not tensor.is_floating_point():
        return
    noise = torch.randn(tensor.shape, generator=generator)
    if "norm" in name:
        tensor.copy_(1.0 + 0.1 * noise)
    elif "bias" in name or "sinks" in name:
        tensor.copy_(0.1 * noise)
    elif "embed_tokens" in name:
        tensor.copy_(noise)
    elif name.endswith(("gate.weight", "router.weight")):
        tensor.copy_(noise / tensor.shape[-1] ** 0.5 * 2.0)
    else:
        fan_in = tensor.shape[-1] if tensor.dim() == 2 else min(tensor.shape[-2:])
        tensor.copy_(1.5 * noise / fan_in**0.5)


def make_checkpoint(
    family: str,
    path: Path,
    dtype: torch.dtype = torch.float32,
    *,
    fused: bool = False,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Save a tiny model under `path` and return `path`.

    Per-expert layout as `save_pretrained` writes it, or with `fused=True` the layout of
    transformers' modules (one tensor per layer and projection). A small `max_shard_size`, like
    `"40KB"`, gives several shards and an index.
    """
    model = make_model(family, dtype, **overrides)
    model.save_pretrained(path, max_shard_size=max_shard_size, save_original_format=not fused)
    return Path(path)


def rewrite_tensors(path: Path, change: Any) -> None:
    """Load a one-file checkpoint's tensors as a dict, let `change(dict)` edit it, and save it."""
    from safetensors.torch import load_file

    file = Path(path) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # none may share memory
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(path: Path, **changes: Any) -> None:
    """Change entries of config.json; a value of None removes the entry."""
    file = Path(path) / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    file.write_text(json.dumps(config, indent=2))
