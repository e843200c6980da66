"""Records what the routers of a model do with a text, for the simulator and for benchmarks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .experts import StreamedExperts
from .predictor import ExpertPredictor, unit_embeddings
from .traces import Trace, make_trace

_MAX_WINDOW_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Window:
    """One stretch of the text, run through the model on its own."""

    token_ids: NDArray[np.int64]  # [tokens]
    expert_ids: NDArray[np.int64]  # [tokens, layers, k], the largest weight first
    weights: NDArray[np.float32]  # [tokens, layers, k], as the experts' outputs are weighted
    hidden: NDArray[np.float32]  # [tokens, layers, hidden], the router inputs
    embeddings: NDArray[np.float32]  # [tokens, hidden], see `unit_embeddings`

    @property
    def sources(self) -> NDArray[np.float32]:
        """[tokens, 1 + layers, hidden]: all that a predictor foresees from."""
        return np.concatenate([self.embeddings[:, None], self.hidden], axis=1)


def record(model: Any, token_ids: Tensor, *, predictions: bool = False) -> Trace:
    """Return a trace of `token_ids` [tokens], run in windows.

    Each window is a sequence of its own, of at most 1024 tokens. With `predictions`, a fresh
    predictor runs over the tokens as if they were decoded one by one, and what it foresaw at each
    distance is added: `predicted_ids` and `predicted_need` [tokens, layers, distances, 2k], and as
    `first_predicted_ids` and `first_predicted_need` what it foresaw from the tokens' embeddings.
    """
    experts = _experts(model)
    top_k = model.expert_cache.top_k
    num_ranked = min(2 * top_k, experts[0].num_experts)
    predictor = ExpertPredictor.for_model(model) if predictions else None
    parts: dict[str, list[NDArray[Any]]] = {}
    offsets = [0]
    for window in windows(model, token_ids):
        rows: dict[str, NDArray[Any]] = {
            "expert_ids": window.expert_ids,
            "weights": window.weights.astype(np.float16),
        }
        if predictor is not None:
            ids, need = predictor.replay(window.sources, window.token_ids, num_ranked)
            need = need.astype(np.float16)
            rows |= {"first_predicted_ids": ids[:, 0], "first_predicted_need": need[:, 0]}
            rows |= {"predicted_ids": ids[:, 1:], "predicted_need": need[:, 1:]}
        for name, values in rows.items():
            parts.setdefault(name, []).append(values)
        offsets.append(offsets[-1] + len(window.token_ids))
    arrays = {name: np.concatenate(values) for name, values in parts.items()} | {
        "sequence_offsets": np.array(offsets, np.int64),
        "num_experts": np.array(experts[0].num_experts, np.int64),
    }
    return make_trace(arrays)


def windows(model: Any, token_ids: Tensor) -> Iterator[Window]:
    """Run a streamed model over `token_ids` [tokens] and yield what its routers saw and did."""
    experts = _experts(model)
    length = min(_MAX_WINDOW_TOKENS, model.config.get_text_config().max_position_embeddings)
    for part in token_ids.split(length):
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        embedded: list[Tensor] = []

        def note(module: Any, arguments: Any, seen: list[Any] = seen) -> None:
            seen.append(arguments)

        def note_embedding(
            module: Any, arguments: Any, output: Tensor, embedded: list[Any] = embedded
        ) -> None:
            embedded.append(unit_embeddings(output[0].float()))

        with contextlib.ExitStack() as hooks, torch.no_grad():
            embedding = model.get_input_embeddings()
            hooks.callback(embedding.register_forward_hook(note_embedding).remove)
            for module in experts:
                hooks.callback(module.register_forward_pre_hook(note).remove)
            model(part.unsqueeze(0), use_cache=False, logits_to_keep=1)
        hidden = [h.float() for h, _, _ in seen]
        order = [w.float().argsort(dim=-1, descending=True, stable=True) for _, _, w in seen]
        ids = [i.gather(-1, o) for (_, i, _), o in zip(seen, order, strict=True)]
        weights = [w.float().gather(-1, o) for (_, _, w), o in zip(seen, order, strict=True)]
        yield Window(
            token_ids=part.numpy(),
            expert_ids=torch.stack(ids, 1).numpy(),
            weights=torch.stack(weights, 1).numpy(),
            hidden=torch.stack(hidden, 1).numpy(),
            embeddings=embedded[0].numpy(),
        )


def _experts(model: Any) -> list[StreamedExperts]:
    """The experts modules of a streamed model, in the order in which they run."""
    modules = [module for module in model.modules() if isinstance(module, StreamedExperts)]
    return sorted(modules, key=lambda module: module.layer_index)
