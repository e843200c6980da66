"""ExpertFlow: mixture-of-experts models whose experts do not fit into memory."""

from .biased_routing import BiasedRouter, BiasedRouting
from .build_info import build_info
from .cache import ExpertCache, hit_rate
from .errors import CheckpointError, CudaError, TransferError, UnsupportedModelError
from .loading import from_pretrained
from .model_info import ModelInfo, model_info
from .moe_layer import MoELayer
from .predictor import ExpertPredictor
from .routers import Routers

__all__ = [
    "BiasedRouter",
    "BiasedRouting",
    "CheckpointError",
    "CudaError",
    "ExpertCache",
    "ExpertPredictor",
    "MoELayer",
    "ModelInfo",
    "Routers",
    "TransferError",
    "UnsupportedModelError",
    "build_info",
    "from_pretrained",
    "hit_rate",
    "model_info",
]
