"""ffmoe_torch: a mixture-of-experts feed-forward layer for PyTorch, on the runtime of ffmoe_core."""

from .distributed import get_dense_params
from .functional import fused_moe
from .layer import MoELayer
from .stats import MoEStats

__all__ = ["MoELayer", "MoEStats", "fused_moe", "get_dense_params"]
