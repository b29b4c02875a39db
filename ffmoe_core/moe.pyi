from typing import Any, NamedTuple

from .config import MoEConfig

class MoESaved(NamedTuple):
    """What backward needs beside the inputs."""

    logits: Any  # [T, E] router dtype, or None where config.keeps_logits is False
    z: Any  # [R, 2I] pre-activations, or None where they are recomputed
    routing: Any  # uint8 [n], see RoutingLayout

class MoEResult(NamedTuple):
    """What ``moe_forward`` returns."""

    output: Any  # [T, H]
    losses: Any  # [3] router dtype: aux loss, z-loss (each times its coefficient), router entropy in nats
    routing: Any  # uint8 [n], see RoutingLayout
    saved: MoESaved | None  # None without save_for_backward

class MoEGrads(NamedTuple):
    """What ``moe_backward`` returns: a gradient for each input, of its shape and dtype."""

    x: Any
    router_input: Any  # None where router_input was None (its gradient is in x)
    gate_weight: Any
    w_up: Any  # None where it was added to w_up_grad
    w_down: Any  # None where it was added to w_down_grad

def moe_forward(
    x: Any,
    gate_weight: Any,
    w_up: Any,
    w_down: Any,
    config: MoEConfig,
    *,
    router_input: Any = None,
    expert_bias: Any = None,
    valid_mask: Any = None,
    save_for_backward: bool = True,
    out: Any = None,
) -> MoEResult: ...
def moe_backward(
    grad_output: Any,
    saved: MoESaved | None,
    x: Any,
    gate_weight: Any,
    w_up: Any,
    w_down: Any,
    config: MoEConfig,
    *,
    router_input: Any = None,
    grad_losses: Any = None,
    w_up_grad: Any = None,
    w_down_grad: Any = None,
) -> MoEGrads: ...
