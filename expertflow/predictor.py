"""Foresees which experts later layers will need, and learns it while the model runs.

The arithmetic is csrc/core/predictor; docs/prediction.md says where it comes from and how good it
is. This module feeds it from a model's forward passes; predictor_file.py keeps what it learned.
"""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from . import _core
from .device_predictor import DevicePredictor
from .predictor_file import LearnedState
from .routers import Routers, find_routers

logger = logging.getLogger(__name__)

MAX_DISTANCE = 8
_MAX_TOKEN_BUCKETS = 8192
# Rows that are predicted and learned from in one pass, the last of each sequence and at least one:
# a long prompt must not cost more than the experts it routes to.
_MAX_ROWS = 8


class ExpertPredictor:
    """Predicts for each MoE layer what the layers behind it will need.

    An instance is a `predictor` for `MoELayer`: for each layer in turn, `foresee` says from its
    router input what the layers behind it will need, and `learn` compares what was foreseen for
    this layer with how it routes. It belongs to one model. Passes of several threads may take
    turns, but what they teach is then worth less.

    Args:
        routers: of the model, see `find_routers`.
        max_distance: layers that it looks ahead, at most 8.
        num_token_buckets: token ids are told apart modulo this; 0 ignores them. It remembers an
            average for each bucket and layer, 4 * experts bytes.
    """

    def __init__(
        self,
        routers: Routers,
        *,
        max_distance: int = MAX_DISTANCE,
        num_token_buckets: int = _MAX_TOKEN_BUCKETS,
    ) -> None:
        if not 1 <= max_distance <= MAX_DISTANCE:
            raise ValueError(f"max_distance={max_distance} is not between 1 and {MAX_DISTANCE}")
        empty = np.empty(0, np.float32)
        weights = routers.stacked_weights()
        self._core = _core.Predictor(
            weights,
            biases=empty if routers.biases is None else routers.biases,
            corrections=empty if routers.corrections is None else routers.corrections,
            top_k=routers.top_k,
            is_sigmoid=routers.is_sigmoid,
            num_groups=routers.num_groups,
            top_groups=routers.top_groups,
            max_distance=max_distance,
            num_token_buckets=num_token_buckets,
        )
        self.num_layers, self.num_experts, self.hidden_size = weights.shape
        self._router_norms = np.linalg.norm(weights, axis=-1)  # tells models apart
        self.max_distance = max_distance
        self.num_token_buckets = num_token_buckets
        # On a GPU a pass of one sequence is seen by its last row: a prompt needs no foresight.
        self._on_device: DevicePredictor | None = None
        self._is_on_device = False  # the pass, and with it what was learned last
        self._is_refused = False  # by the device: the host does it all
        self._begun_layer: int | None = None
        self._token_ids: Tensor | None = None
        self._shape = (1, 1)  # of the pass: sequences, rows of each
        self._rows_kept = 1  # of each sequence
        self._last_layer = self.num_layers

    @classmethod
    def for_model(cls, model: nn.Module, *, max_distance: int = MAX_DISTANCE) -> ExpertPredictor:
        """Return a predictor of a transformers model, which tells it the token ids of each pass."""
        embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        num_buckets = min(_MAX_TOKEN_BUCKETS, int(embedding.num_embeddings))  # type: ignore[arg-type]
        predictor = cls(
            find_routers(model), max_distance=max_distance, num_token_buckets=num_buckets
        )
        owner = weakref.ref(predictor)

        def note_tokens(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if torch.compiler.is_compiling():
                return
            alive = owner()
            if alive is not None and arguments:
                alive.note_tokens(arguments[0])

        embedding.register_forward_pre_hook(note_tokens)
        return predictor

    def note_tokens(self, token_ids: Tensor) -> None:
        """Take the token ids [sequences, rows] of the pass that is about to begin."""
        self._token_ids = token_ids

    def foresee(self, layer: int, hidden_states: Tensor, max_distance: int) -> NDArray[np.float32]:
        """Foresee from the router input [rows, hidden] of `layer` what later layers will need.

        A layer that does not come after the last one, or has other rows, begins a new pass.

        Returns:
            [distances, experts], row d - 1 for the layer d after this one: of at most
            `max_distance` layers, its own maximum, and those that are left.
        """
        if self._begun_layer != layer:
            self.begin_layer(layer, hidden_states)
        self._begun_layer = None
        if not self._is_on_device:
            self._observe(layer, hidden_states, max_distance)
        return self._needs(max_distance)

    def _observe(self, layer: int, hidden_states: Tensor, max_distance: int) -> None:
        states = hidden_states.detach().reshape(*self._shape, -1)[:, -self._rows_kept :]
        self._core.observe(layer, states.float().cpu().numpy())
        # It learns from what it foresaw, and a longer horizon must find its first layer learned.
        self._core.predict(layer, max_distance + 1)

    def _needs(self, max_distance: int) -> NDArray[np.float32]:
        needs = np.empty((min(max_distance, self.num_distances), self.num_experts), np.float32)
        for row, need in enumerate(needs):
            need[:] = self.need(row + 1)
        return needs

    def foresee_token(self, embeddings: Tensor, max_distance: int) -> NDArray[np.float32]:
        """Begin a pass and foresee its first layers from [sequences, rows, hidden] embeddings.

        Returns:
            As `foresee`, row 0 for layer 0.
        """
        self._begin_pass(embeddings.flatten(0, 1))
        self._last_layer = _core.TOKEN_START
        if self._is_on_device:
            assert self._on_device is not None
            self._on_device.observe(_core.TOKEN_START, unit_embeddings(embeddings[0, -1]))
        else:
            self._observe(_core.TOKEN_START, unit_embeddings(embeddings), max_distance)
        return self._needs(max_distance)

    def begin_layer(self, layer: int, hidden_states: Tensor) -> None:
        """Have a GPU start on what `foresee` of this layer is about to tell.

        Called before the host waits for the layer's expert ids, so that it need not wait for the
        needs as well. A host that foresees itself computes only when it is asked.
        """
        num_rows = hidden_states.shape[0]
        if layer <= self._last_layer or num_rows != self._shape[0] * self._shape[1]:
            self._begin_pass(hidden_states)
        self._last_layer = self._begun_layer = layer
        if self._is_on_device:
            assert self._on_device is not None
            self._on_device.observe(layer, hidden_states[-1])

    def learn(self, layer: int) -> None:
        """Learn from how `layer`, which was given to `foresee` last, routes."""
        self._active.learn(layer)

    @property
    def num_distances(self) -> int:
        """How many layers ahead the last `foresee` could have told."""
        return self._active.num_distances

    def need(self, distance: int) -> NDArray[np.float32]:
        """[experts]: the probability that the layer so far ahead needs each of them."""
        return self._active.need(distance)

    def replay(
        self, hidden: NDArray[Any], token_ids: NDArray[Any], num_ranked: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Run over recorded router inputs as if decoding: each token is foreseen, then learned.

        Args:
            hidden: [tokens, layers, hidden], any float type; or with the tokens' embeddings, as
                `unit_embeddings` gives them, in front of the layers: then it foresees from these
                as well, and its distance 1 is layer 0.
            token_ids: [tokens], or empty.
            num_ranked: experts to name for each layer and distance.

        Returns:
            ids and needs, [tokens, layers, max_distance, num_ranked]: entry [t, l, d - 1] was
            foreseen at layer l for layer l + d, the most needed first; 0 where there is none. With
            embeddings, what was foreseen from them stands in front of the layers.
        """
        self._move_to_host()
        return self._core.replay(
            np.asarray(hidden, np.float32), np.asarray(token_ids, np.int64), num_ranked
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save what was learned as a safetensors file."""
        self._move_to_host()
        self._learned().save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over what `save` saved; nothing changes if the file does not fit.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is damaged, or was not saved by `save`.
            ValueError: it belongs to a model or predictor of other sizes.
        """
        self._move_to_host()
        self._learned().load(path)

    def _learned(self) -> LearnedState:
        """The host's state, which must hold what was learned: see `_move_to_host`."""
        sizes = {
            "layers": self.num_layers,
            "experts": self.num_experts,
            "hidden size": self.hidden_size,
            "max_distance": self.max_distance,
            "token buckets": self.num_token_buckets,
        }
        return LearnedState(self._core.state, self._router_norms, sizes)

    @property
    def _active(self) -> _core.Predictor | DevicePredictor:
        if not self._is_on_device:
            return self._core
        assert self._on_device is not None
        return self._on_device

    def _find_device(self, hidden_states: Tensor) -> DevicePredictor | None:
        """The predictor on a GPU that computes `hidden_states`, made when it is first needed."""
        if not hidden_states.is_cuda or self._is_refused:
            return None
        if self._on_device is None:
            try:
                self._on_device = DevicePredictor(
                    self._core, hidden_states.device, self.hidden_size
                )
            except (ValueError, MemoryError) as error:
                logger.warning("experts are foreseen on the host, which takes longer: %s", error)
                self._is_refused = True
            self._is_on_device = not self._is_refused
        if self._on_device is None or self._on_device.device != hidden_states.device:
            return None
        return self._on_device

    def _move_to_host(self) -> None:
        """Copy what was learned on the device back; the next layer begins a new pass."""
        self._last_layer = self.num_layers
        if self._is_on_device and self._on_device is not None:
            self._on_device.copy_to(self._core)
        self._is_on_device = False

    def _begin_pass(self, hidden_states: Tensor) -> None:
        num_rows = hidden_states.shape[0]
        token_ids, self._token_ids = self._token_ids, None
        if token_ids is not None and (token_ids.dim() != 2 or token_ids.numel() != num_rows):
            token_ids = None  # not of this pass
        is_batch = token_ids is not None and token_ids.shape[0] > 1
        device = None if is_batch else self._find_device(hidden_states)
        if device is not None:
            if not self._is_on_device:
                device.copy_from(self._core)
                self._is_on_device = True
            self._shape = (1, num_rows)
            device.begin_pass(None if token_ids is None else token_ids[0, -1])
            return
        self._move_to_host()
        if token_ids is not None and bool((token_ids < 0).any()):
            token_ids = None  # not all of them tokens
        self._shape = (1, num_rows)
        if token_ids is not None:
            self._shape = (token_ids.shape[0], token_ids.shape[1])
        num_sequences, rows = self._shape
        self._rows_kept = min(rows, max(1, _MAX_ROWS // num_sequences))
        kept = np.empty(0, np.int64)
        if token_ids is not None:
            kept = token_ids[:, -self._rows_kept :].to(torch.int64).cpu().numpy()
        self._core.begin_pass(num_sequences, self._rows_kept, kept)


def unit_embeddings(embeddings: Tensor) -> Tensor:
    """[..., hidden] in units of their root mean square, as the norm before a router gives it on."""
    return functional.rms_norm(embeddings.detach(), embeddings.shape[-1:])


def predictor_bytes(
    num_layers: int, num_experts: int, hidden_size: int, max_distance: int, vocabulary: int
) -> int:
    """Memory of what `ExpertPredictor.for_model` makes."""
    # From the embedding and from each layer to those behind it.
    num_pairs = sum(min(max_distance, behind) for behind in range(num_layers + 1))
    num_features = 2 * hidden_size + num_experts + 16
    num_buckets = min(_MAX_TOKEN_BUCKETS, vocabulary)
    floats_per_expert = num_pairs * num_features + num_layers * (hidden_size + num_buckets)
    return 4 * num_experts * floats_per_expert
