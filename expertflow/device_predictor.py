"""The predictor in the memory of a CUDA device, one row a pass."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _core

_DTYPES = {
    torch.float32: _core.DTYPE_CODES["float32"],
    torch.bfloat16: _core.DTYPE_CODES["bfloat16"],
    torch.float16: _core.DTYPE_CODES["float16"],
}


class DevicePredictor:
    """Foresees and learns as `_core.Predictor` does, in one launch each.

    Launches go to the stream that is current: after `observe` the needs are on their way to the
    host, and `need` waits for them unless something else has waited for the stream meanwhile. What
    was learned lives either here or on the host: whoever uses both copies it over.
    """

    def __init__(self, host: _core.Predictor, device: torch.device, hidden_size: int) -> None:
        """Take over what `host` has learned.

        Raises:
            ValueError: the kernels do not take such sizes.
            MemoryError: the device has no room for it.
        """
        self.device = device
        self._hidden_size = hidden_size
        self._core = _core.CudaPredictor(host, device.index)
        self._token_id: Tensor | None = None  # stays as it is while kernels may read it

    def begin_pass(self, token_id: Tensor | None) -> None:
        """Begin the next token, whose id may lie on the device or on the host."""
        if token_id is not None:
            token_id = token_id.reshape(1).to(self.device, torch.int64)
        self._core.begin_pass(self._stream())
        self._token_id = token_id

    def join_learning(self) -> None:
        """Have the current stream wait until all is learned; also ends the capture of a pass."""
        self._core.join_learning(self._stream())

    def observe(self, layer: int, hidden_states: Tensor) -> None:
        """Foresee from one row of the router input of `layer`, or of embeddings: TOKEN_START."""
        row = hidden_states.detach().reshape(-1).contiguous()
        if row.numel() != self._hidden_size:
            raise ValueError(
                f"a router input has {row.numel()} values, expected {self._hidden_size}"
            )
        dtype = _DTYPES.get(row.dtype)
        if dtype is None or row.data_ptr() % 16:
            row, dtype = row.to(torch.float32, copy=True), _DTYPES[torch.float32]
        token_id = 0 if self._token_id is None else self._token_id.data_ptr()
        self._core.observe(layer, row.data_ptr(), dtype, token_id, self._stream())

    def learn(self, layer: int) -> None:
        """Learn from how `layer` routes, on a stream of its own."""
        self._core.learn(layer, self._stream())

    @property
    def num_distances(self) -> int:
        """How many layers ahead the last `observe` foresees."""
        return self._core.num_distances

    def need(self, distance: int) -> NDArray[np.float32]:
        """[experts]: the probability that the layer so far ahead needs each of them."""
        return self._core.need(distance)

    def copy_from(self, host: _core.Predictor) -> None:
        """Go on with what `host` has learned."""
        self._core.copy_from(host)

    def copy_to(self, host: _core.Predictor) -> None:
        """Have `host` go on with what was learned here."""
        self._core.copy_to(host)

    def _stream(self) -> int:
        stream: int = torch.cuda.current_stream(self.device).cuda_stream
        return stream
