"""Experts of a few MoE layers in a plain file, for tests that need a cache but no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from expertflow import ExpertCache
from expertflow._core import DTYPE_CODES, CheckpointSource, ExpertLayout


class RandomExperts:
    """`gate_up_proj` [layers, experts, 2I, H] and `down_proj` [layers, experts, H, I]."""

    def __init__(
        self,
        file: Path,
        dtype: torch.dtype = torch.float32,
        *,
        num_layers: int = 3,
        num_experts: int = 8,
        hidden: int = 16,
        intermediate: int = 12,
    ) -> None:
        self.file, self.num_layers, self.num_experts = file, num_layers, num_experts
        generator = torch.Generator().manual_seed(0)
        sizes = {"gate_up_proj": (2 * intermediate, hidden), "down_proj": (hidden, intermediate)}
        self.shapes: dict[str, tuple[int, ...]] = dict(sizes)
        self.weights = {
            role: (torch.randn(num_layers, num_experts, *shape, generator=generator) / 4).to(dtype)
            for role, shape in sizes.items()
        }
        dtype_name = str(dtype).removeprefix("torch.")
        self.layout = ExpertLayout([(r, dtype_name, h * w) for r, (h, w) in sizes.items()])
        extents = np.empty((num_layers * num_experts, 2, 5), np.int64)
        with file.open("wb") as out:
            for row in range(num_layers * num_experts):
                for column, (role, _, offset, num_bytes) in enumerate(self.layout.segments):
                    num_elements = num_bytes // dtype.itemsize
                    extent = (0, out.tell(), offset, num_elements, DTYPE_CODES[dtype_name])
                    extents[row, column] = extent
                    tensor = self.weights[role].flatten(0, 1)[row].contiguous()
                    out.write(tensor.view(torch.uint8).numpy().tobytes())
        self.source = CheckpointSource([str(file)], self.layout, extents)

    def cache(self, num_slots: int, *, pool: str = "file", top_k: int = 2, **kwargs: Any) -> Any:
        """A cache before them; `kwargs` are those of ExpertCache."""
        kwargs = {"num_slots": num_slots, "num_threads": 1} | kwargs
        if pool == "ram":
            return ExpertCache.from_tensors(self.weights, top_k, **kwargs)
        sizes = (self.num_layers, self.num_experts, top_k)
        return ExpertCache(self.source, self.layout, self.shapes, *sizes, **kwargs)

    def mlp(self, layer: int, expert: int, tokens: Tensor) -> Tensor:
        """What one expert makes of `tokens`, in fp64: the reference."""
        gate_up, down = (
            self.weights[role][layer, expert].double() for role in ("gate_up_proj", "down_proj")
        )
        gate, up = (tokens.double() @ gate_up.t()).chunk(2, dim=-1)
        return (functional.silu(gate) * up) @ down.t()
