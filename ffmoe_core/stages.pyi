from typing import Any, NamedTuple

from .config import MoEConfig
from .plan import RoutingPlan

class Routing(NamedTuple):
    """What ``route`` returns."""

    topk_idx: Any  # int32 [T, K]; -1 for tokens that valid_mask leaves out
    topk_weights: Any  # [T, K] router dtype
    tokens_per_expert: Any  # int32 [E], before anything is dropped
    losses: Any  # [3]: aux loss, z-loss (each times its coefficient), router entropy in nats
    logits: Any  # [T, E] router dtype

def route(
    x: Any, gate_weight: Any, config: MoEConfig, *, expert_bias: Any = None, valid_mask: Any = None
) -> Routing: ...
def make_plan(
    topk_idx: Any,
    topk_weights: Any,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: str = "position",
    validate: bool = True,
) -> RoutingPlan: ...
def permute(x: Any, plan: RoutingPlan, *, out: Any = None) -> Any: ...
def combine(rows: Any, plan: RoutingPlan, *, weighted: bool = True, out: Any = None) -> Any: ...
def grouped_gemm(
    a: Any,
    b: Any,
    expert_offsets: Any,
    *,
    row_index: Any = None,
    transpose_b: bool = True,
    out: Any = None,
    validate: bool = True,
) -> Any: ...
def grouped_gemm_wgrad(
    a: Any,
    b: Any,
    expert_offsets: Any,
    *,
    a_index: Any = None,
    b_index: Any = None,
    out: Any = None,
    accumulate: bool = False,
    validate: bool = True,
) -> Any: ...
