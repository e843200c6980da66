"""Generate text and measure what the expert cache did for it."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import hit_rate


@dataclass(frozen=True)
class Generation:
    """A continuation and what it cost."""

    text: str
    prompt_tokens: int
    token_ids: Tensor  # [new tokens]
    logits: Tensor | None  # [new tokens, vocabulary], if asked for
    seconds: float  # from the prompt to the last token
    statistics: dict[str, Any]  # of the expert cache, see ExpertCache.statistics
    expert_cache_bytes: int
    expert_pool_bytes: int
    policy: str
    device: str

    @property
    def new_tokens(self) -> int:
        """How many tokens were generated."""
        return self.token_ids.shape[0]

    @property
    def tokens_per_second(self) -> float:
        """New tokens over all of the time, that of the prompt included."""
        return self.new_tokens / self.seconds

    @property
    def stall_ms_per_token(self) -> float:
        """How long computation waited for experts, per new token."""
        return float(self.statistics["stall_us"]) / 1000 / max(self.new_tokens, 1)

    def to_json(self) -> dict[str, Any]:
        """Return the figures that `expertflow generate --json` prints."""
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "tokens_per_second": self.tokens_per_second,
            "hit_rate": hit_rate(self.statistics),
            "stall_ms_per_token": self.stall_ms_per_token,
            "demand_bytes": self.statistics["demand_bytes"],
            "prefetch_bytes": self.statistics["prefetch_bytes"],
            "wasted_prefetch_bytes": self.statistics["wasted_prefetch_bytes"],
            "prefetch_hits": self.statistics["prefetch_hits"],
            "horizon": self.statistics["horizon"],
            "routes": self.statistics["routes"],
            "changed_routes": self.statistics["changed_routes"],
            "expert_cache_bytes": self.expert_cache_bytes,
            "expert_pool_bytes": self.expert_pool_bytes,
            "policy": self.policy,
            "device": self.device,
        }


def encode(tokenizer: Any, prompt: str) -> Any:
    """Return the model's inputs for `prompt`; ValueError if it has no tokens."""
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token to continue")
    return inputs


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: Any = None,
    keep_logits: bool = False,
) -> Generation:
    """Continue `prompt`: greedy, or sampled if `temperature` is above 0.

    Args:
        model: from `from_pretrained`. The statistics of its cache are reset.
        tokenizer: the model's.
        prompt: at least one token.
        max_new_tokens: it ends earlier at the model's end-of-text token.
        temperature: of the sampling.
        seed: of the sampling; the same seed gives the same text.
        streamer: gets the tokens as they come, see transformers' TextStreamer.
        keep_logits: also return the logits of every new token.
    """
    inputs = encode(tokenizer, prompt).to(model.device)
    prompt_tokens = inputs["input_ids"].shape[1]
    sampling: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    torch.manual_seed(seed)
    cache = model.expert_cache
    cache.reset_statistics()
    begin = time.perf_counter()
    output = model.generate(
        **inputs,
        **sampling,
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        return_dict_in_generate=True,
        output_logits=keep_logits,
    )
    seconds = time.perf_counter() - begin
    token_ids = output.sequences[0, prompt_tokens:]
    return Generation(
        text=tokenizer.decode(token_ids, skip_special_tokens=True),
        prompt_tokens=prompt_tokens,
        token_ids=token_ids,
        logits=torch.cat(output.logits) if keep_logits else None,
        seconds=seconds,
        statistics=cache.statistics(),
        expert_cache_bytes=cache.num_bytes,
        expert_pool_bytes=cache.num_layers * cache.num_experts * cache.slot_bytes,
        policy=cache.policy,
        device=str(model.device),
    )
