"""ffmoe_torch: a mixture-of-experts feed-forward layer for PyTorch, on the runtime of ffmoe_core."""

from .distributed import clip_grad_norm_, ddp_ignored, full_state_dict, get_dense_params, shard_experts
from .functional import fused_moe
from .layer import MoELayer
from .stats import MoEStats

__all__ = [
    "MoELayer",
    "MoEStats",
    "clip_grad_norm_",
    "ddp_ignored",
    "full_state_dict",
    "fused_moe",
    "get_dense_params",
    "shard_experts",
]
