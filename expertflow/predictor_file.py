"""The file that keeps what an `ExpertPredictor` learned."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError

_FORMAT = "expertflow-predictor-2"


@dataclass(frozen=True, slots=True)
class LearnedState:
    """What a predictor learned, and what tells whose it is; `load` takes only what fits it."""

    arrays: Mapping[str, NDArray[np.float32]]
    router_norms: NDArray[np.float32]  # [layers, experts], tells models of the same sizes apart
    sizes: Mapping[str, int]  # of model and predictor, by the names that errors use

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, which is there only when it is complete."""
        from safetensors.numpy import save_file

        path = Path(path)
        part = path.with_name(path.name + ".part")
        try:
            save_file(self.tensors(), part, metadata=self.metadata())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Overwrite `arrays` with those of a file, or raise as `ExpertPredictor.load` does."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path} with a saved predictor")
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a saved predictor: {error}") from error
        self._check_metadata(path, metadata)
        self._check_tensors(path, found)
        for name, array in self.arrays.items():
            array[...] = found[name]

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """All that the file holds."""
        return {**self.arrays, "router_norms": self.router_norms}

    def metadata(self) -> dict[str, str]:
        """What the file says about itself."""
        return {"format": _FORMAT} | {name: str(size) for name, size in self.sizes.items()}

    def _check_metadata(self, path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(
                f"{path} is not a predictor that this version saves: its format is "
                f"{metadata.get('format')!r}, not {_FORMAT!r}"
            )
        for name, size in self.metadata().items():
            if metadata.get(name) != size:
                raise ValueError(
                    f"{path} was saved for {name} {metadata.get(name)}, and this predictor has "
                    f"{size}: it was learned on another model, or with other settings"
                )

    def _check_tensors(
        self, path: str | os.PathLike[str], tensors: Mapping[str, NDArray[Any]]
    ) -> None:
        for name, expected in self.tensors().items():
            found = tensors.get(name)
            if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
                shape = None if found is None else (*found.shape, str(found.dtype))
                raise CheckpointError(
                    f"{path}: {name} should be {(*expected.shape, 'float32')}, found {shape}"
                )
            if not np.isfinite(found).all():
                raise CheckpointError(f"{path}: {name} has values that are not finite")
        # Loose, so that the same model may be loaded in another dtype.
        if not np.allclose(tensors["router_norms"], self.router_norms, rtol=0.02):
            raise ValueError(f"{path} was learned on another model: its routers differ")
