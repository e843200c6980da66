"""The slots of an expert cache as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _core

# The tensors of one expert by role, e.g. {"gate_up_proj": [2I, H], "down_proj": [H, I]}.
ExpertWeights = dict[str, Tensor]


class Slots:
    """Views of the memory of a cache's slots, whichever experts these hold.

    Args:
        core: the cache. Its memory stays while this or one of the views is alive.
        layout: the tensors of one expert.
        segment_shapes: their shapes, by role.
        num_slots: of `core`.
        device: of `core`.
    """

    def __init__(
        self,
        core: _core.ExpertCache | _core.CudaExpertCache,
        layout: _core.ExpertLayout,
        segment_shapes: dict[str, tuple[int, ...]],
        num_slots: int,
        device: torch.device,
    ) -> None:
        self._memory: _core.ExpertCache | Tensor  # on CUDA [slots, bytes]
        if isinstance(core, _core.ExpertCache):
            self._memory = core
        else:
            self._memory = torch.as_tensor(_CudaMemory(core), device=device)
        self._segments = [
            (role, getattr(torch, dtype), offset, num_bytes, segment_shapes[role])
            for role, dtype, offset, num_bytes in layout.segments
        ]
        self._weights: list[ExpertWeights | None] = [None] * num_slots
        self._stacked: ExpertWeights = {}  # on CUDA: of all slots
        if isinstance(self._memory, Tensor):
            self._stacked = self._views(self._memory)

    def weights(self, slot: int) -> ExpertWeights:
        """Return the tensors in `slot`."""
        weights = self._weights[slot]
        if weights is None:
            weights = self._weights[slot] = self._views(self._memory_of(slot))
        return weights

    def _views(self, memory: Tensor) -> ExpertWeights:
        """The tensors in `memory` [..., bytes], each [..., *its shape]."""
        return {
            role: memory[..., offset : offset + num_bytes].view(dtype).unflatten(-1, shape)
            for role, dtype, offset, num_bytes, shape in self._segments
        }

    def _memory_of(self, slot: int) -> Tensor:
        if isinstance(self._memory, Tensor):
            return self._memory[slot]
        return torch.from_numpy(self._memory.slot_memory(slot))

    def stacked_weights(self, slots: slice) -> ExpertWeights:
        """Return the tensors of `slots`, each [slots, ...]; CUDA only."""
        return {role: every_slot[slots] for role, every_slot in self._stacked.items()}

    @property
    def num_used(self) -> int:
        """Of how many slots `weights` was asked for."""
        return sum(weights is not None for weights in self._weights)


class _CudaMemory:
    """The slots in device memory, as torch.as_tensor takes them without a copy."""

    def __init__(self, core: _core.CudaExpertCache) -> None:
        self._core = core  # the tensor keeps this object, and so the slots, alive
        self.__cuda_array_interface__ = core.slots_interface()
