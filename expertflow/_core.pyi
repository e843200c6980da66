from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPE_CODES: dict[str, int]
POLICIES: tuple[str, ...]

def build_info() -> dict[str, Any]: ...
def min_slots(num_layers: int, top_k: int, scope: str) -> int: ...

class ExpertLayout:
    def __init__(self, segments: Sequence[tuple[str, str, int]]) -> None: ...
    @property
    def segments(self) -> list[tuple[str, str, int, int]]: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def pool_bytes_per_expert(self) -> int: ...

class ExpertSource: ...

class CheckpointSource(ExpertSource):
    def __init__(
        self, files: Sequence[str], layout: ExpertLayout, extents: NDArray[np.int64]
    ) -> None: ...

class RamPool(ExpertSource):
    def __init__(self, layout: ExpertLayout, num_experts: int, numa_node: int = -1) -> None: ...
    @property
    def num_bytes(self) -> int: ...
    def expert_memory(self, expert: int) -> NDArray[np.uint8]: ...
    def start_fill(self, source: CheckpointSource, num_threads: int) -> PoolFill: ...

class PoolFill:
    @property
    def bytes_done(self) -> int: ...
    @property
    def bytes_total(self) -> int: ...
    def cancel(self) -> None: ...
    def wait(self, timeout_seconds: float) -> bool: ...

class _AnyExpertCache:
    @property
    def handle(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def bandwidth_bytes_per_second(self) -> float: ...
    def residents(self, layer: int) -> NDArray[np.uint8]: ...
    @property
    def horizon(self) -> int: ...
    def set_horizon(self, horizon: int) -> None: ...
    def begin_token(self, num_tokens: int) -> int: ...
    def begin_prefetch(self) -> int: ...
    def prefetch_predicted(self, need: NDArray[np.float32]) -> int: ...
    def statistics(self) -> dict[str, Any]: ...
    def reset_statistics(self) -> None: ...

class ExpertCache(_AnyExpertCache):
    def __init__(
        self,
        source: ExpertSource,
        layout: ExpertLayout,
        num_layers: int,
        num_experts: int,
        top_k: int,
        num_slots: int,
        policy: str,
        scope: str,
        decay: float,
        chunk_bytes: int,
        num_threads: int,
    ) -> None: ...
    def slot_memory(self, slot: int) -> NDArray[np.uint8]: ...

# The two below are there if the CUDA backend was built.
class PinnedPool(ExpertSource):
    def __init__(self, pool: RamPool, device: int, is_required: bool) -> None: ...
    @property
    def failure(self) -> str | None: ...
    def pin(self, first: int, last: int) -> None: ...
    def start_fill(self, pool: RamPool, source: CheckpointSource, num_threads: int) -> PoolFill: ...

class CudaExpertCache(_AnyExpertCache):
    def __init__(
        self,
        source: ExpertSource,
        layout: ExpertLayout,
        num_layers: int,
        num_experts: int,
        top_k: int,
        num_slots: int,
        policy: str,
        scope: str,
        decay: float,
        chunk_bytes: int,
        num_threads: int,
        device: int,
        mlp_hidden: int | None,
    ) -> None: ...
    def slots_interface(self) -> dict[str, Any]: ...

TOKEN_START: int  # the layer that stands for a token's embedding

class Predictor:
    def __init__(
        self,
        weights: NDArray[np.float32],
        *,
        biases: NDArray[np.float32],
        corrections: NDArray[np.float32],
        top_k: int,
        is_sigmoid: bool,
        num_groups: int,
        top_groups: int,
        max_distance: int,
        num_token_buckets: int,
    ) -> None: ...
    def begin_pass(
        self, num_sequences: int, rows_per_sequence: int, tokens: NDArray[np.int64]
    ) -> None: ...
    def observe(self, layer: int, hidden: NDArray[np.float32]) -> None: ...
    def predict(self, layer: int, max_distance: int = ...) -> None: ...
    def learn(self, layer: int) -> None: ...
    @property
    def num_distances(self) -> int: ...
    def need(self, distance: int) -> NDArray[np.float32]: ...
    def scores(self, distance: int) -> NDArray[np.float32]: ...
    def replay(
        self, hidden: NDArray[np.float32], tokens: NDArray[np.int64], num_ranked: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...
    @property
    def state(self) -> dict[str, NDArray[np.float32]]: ...

class BiasedRouter:
    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        is_sigmoid: bool,
        num_groups: int,
        top_groups: int,
        corrections: NDArray[np.float32],
        strength: float,
        keep_top: int,
        budget: float,
    ) -> None: ...
    def reroute(
        self,
        layer: int,
        logits: NDArray[np.float32],
        is_resident: NDArray[np.uint8],
        expert_ids: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], int]: ...
    def counts(self) -> list[tuple[int, int]]: ...
    def reset_counts(self) -> None: ...

# There if the CUDA backend was built. Pointers and streams are addresses.
class CudaPredictor:
    def __init__(self, host: Predictor, device: int) -> None: ...
    def begin_pass(self, stream: int) -> None: ...
    def join_learning(self, stream: int) -> None: ...
    def observe(self, layer: int, hidden: int, dtype: int, token_id: int, stream: int) -> None: ...
    def learn(self, layer: int, stream: int) -> None: ...
    @property
    def num_distances(self) -> int: ...
    def need(self, distance: int) -> NDArray[np.float32]: ...
    def copy_from(self, host: Predictor) -> None: ...
    def copy_to(self, host: Predictor) -> None: ...

MAX_HORIZON: int
AUTO_HORIZON: int

def simulate(
    *,
    expert_ids: NDArray[np.uint16],
    num_experts: int,
    predicted_ids: NDArray[np.uint16] | None,
    predicted_need_q16: NDArray[np.uint16] | None,
    first_predicted_ids: NDArray[np.uint16] | None,
    first_predicted_need_q16: NDArray[np.uint16] | None,
    policy: str,
    predictor: str,
    horizon: int,
    num_slots: int,
    expert_bytes: int,
    scope: str,
    bytes_per_second: float,
    latency_ns: int,
    chunk_bytes: int,
    demand_chunk_bytes: int,
    layer_time_ns: int,
    expert_share: float,
    miss_time_ns: int,
    copy_slowdown: float,
    warmup_tokens: int,
) -> dict[str, int]: ...
