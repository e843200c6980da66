"""What is refused rather than run wrong: arguments, quantized checkpoints, conversions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .build_info import build_info
from .errors import UnsupportedModelError

GGUF_REFUSAL = (
    "GGUF files are not supported. Use the model's safetensors checkpoint in bfloat16, float16 or "
    "float32."
)
# Arguments of transformers that only make sense when transformers holds the experts itself.
_REFUSED_ARGUMENTS = {
    "quantization_config": "quantization is not supported; experts are read in bfloat16, float16 "
    "or float32. Leave it out and use an unquantized checkpoint.",
    "load_in_4bit": "quantization is not supported. Leave it out.",
    "load_in_8bit": "quantization is not supported. Leave it out.",
    "gguf_file": GGUF_REFUSAL,
    "state_dict": "weights are read from the checkpoint's files. Save them with save_pretrained "
    "and give the directory.",
    "tp_plan": "tensor parallelism is not supported. Leave it out.",
    "tp_size": "tensor parallelism is not supported. Leave it out.",
    "device_mesh": "tensor parallelism is not supported. Leave it out.",
    "distributed_config": "distributed loading is not supported. Leave it out.",
    "max_memory": "the memory of the experts is set with expert_cache= and pool=. Leave it out.",
    "offload_folder": 'experts that do not fit are read with pool="file". Leave it out.',
    "experts_implementation": "ExpertFlow computes the experts itself. Leave it out.",
    "use_kernels": "kernels that replace the expert computation are not supported. Leave it out.",
    "kernel_config": "kernels that replace the expert computation are not supported. Leave it out.",
    "key_mapping": "renaming tensors while loading is not supported. Save the model again under "
    "its usual tensor names.",
    "trust_remote_code": "models are built from transformers' own code. Leave it out.",
}
_MXFP4_ADVICE = (
    " Dequantize it once: AutoModelForCausalLM.from_pretrained(..., dtype='bfloat16', "
    "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(...)."
)


def refuse_arguments(device_map: Any, arguments: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for an argument that cannot be honoured, naming it."""
    for name, reason in _REFUSED_ARGUMENTS.items():
        if arguments.get(name) not in (None, False, ""):
            raise UnsupportedModelError(f"{name}={arguments[name]!r}: {reason}")
    if arguments.get("use_safetensors") is False:
        raise UnsupportedModelError("use_safetensors=False: ExpertFlow reads safetensors only.")
    if isinstance(device_map, Mapping) and set(device_map) != {""}:
        raise UnsupportedModelError(
            f"device_map={dict(device_map)!r}: spreading or offloading a model is not "
            'supported, because ExpertFlow places the experts itself. Use None, "cpu" or "cuda".'
        )


def chosen_device(device: Any, device_map: Any) -> torch.device:
    """The device that `device=` or transformers' `device_map=` names, with its number.

    Raises UnsupportedModelError if nothing can be computed there.
    """
    if isinstance(device_map, Mapping):
        device_map = device_map.get("")
    name, value = ("device", device) if device_map is None else ("device_map", device_map)
    try:
        chosen = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModelError(
            f'{name}={value!r} is not supported. Use "cpu" or "cuda".'
        ) from error
    if chosen.type == "cpu" and not chosen.index:
        return torch.device("cpu")
    if chosen.type != "cuda":
        raise UnsupportedModelError(f'{name}={value!r} is not supported. Use "cpu" or "cuda".')
    if reason := _why_not_cuda():
        raise UnsupportedModelError(f'{name}={value!r}: {reason}. Use "cpu".')
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        raise UnsupportedModelError(
            f"{name}={value!r}: there are {torch.cuda.device_count()} CUDA devices."
        )
    return torch.device("cuda", index)


def _why_not_cuda() -> str | None:
    info = build_info()
    if info["cuda_compiler"] is None:
        return f"this ExpertFlow has no CUDA backend ({info['cuda_missing_reason']})"
    if not info["gpus"]:
        return f"no GPU can be used ({info['gpus_missing_reason']})"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} cannot use the GPU; install one built with CUDA"
    return None


def refuse_quantized(config: Mapping[str, Any], path: str) -> None:
    """Raise UnsupportedModelError if config.json says that the weights are quantized."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    raise UnsupportedModelError(
        f"{path}: the checkpoint is quantized ({method or 'quantization_config in config.json'}), "
        "which is not supported. Use a checkpoint in bfloat16, float16 or float32."
        + (_MXFP4_ADVICE if method == "mxfp4" else "")
    )


def refuse_conversion(fn: Callable[..., Any], parameter: torch.Tensor) -> None:
    """Raise UnsupportedModelError for an `fn` of nn.Module._apply that changes device or dtype."""
    advice = "load it again with expertflow.from_pretrained(..., device=, dtype=)."
    probe = torch.zeros(1, dtype=parameter.dtype, device=parameter.device)
    try:
        result = fn(probe)
    except Exception as error:
        raise UnsupportedModelError(f"A streamed model cannot be moved; {advice}") from error
    for what, before, after in (
        ("moved", probe.device, result.device),
        ("converted", probe.dtype, result.dtype),
    ):
        if before != after:
            raise UnsupportedModelError(
                f"A streamed model cannot be {what} from {before} to {after}; {advice}"
            )
