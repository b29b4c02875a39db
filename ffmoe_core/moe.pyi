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
) -> MoEResult:
    """The routed experts' weighted output for every token.

    Parameters
    ----------
    x : [T, H], float32, float64, bfloat16 or float16. T may be 0.
    gate_weight : [E, H], dtype of x, or float32.
    w_up : [E, 2I, H], dtype of x; gate rows first, then up rows.
    w_down : [E, H, I], dtype of x.
    router_input : [T, H], dtype of x: what the gate reads instead of x.
    expert_bias : [E] float32, added to the scores for the selection only.
    valid_mask : [T] bool or uint8; tokens with 0 are ignored: no expert, zero output, no part in losses.
        What they hold must be finite all the same.
    save_for_backward : False when no backward will follow; the result's ``saved`` is then None.
    out : [T, H], dtype of x: where to write the output.

    The router computes in float32 (float64 for float64 x), the experts accumulate in float32 (float64).
    Nothing waits for the device, unless ``allow_dropped_tokens=False`` meets a capacity bound, or the
    environment has ``FFMOE_CHECK=1``.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError : an array does not fit, before any work starts.
    CapacityError : more rows than the bound with ``allow_dropped_tokens=False``.
    NonFiniteError : checked mode (``FFMOE_CHECK=1``) found NaN or infinite logits.
    OutOfMemoryError : no room; nothing is lost, and a smaller call works.
    MissingDependencyError : arrays on a GPU without CuPy.
    """

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
) -> MoEGrads:
    """Every gradient of ``moe_forward``, for the same inputs and what it saved.

    Parameters
    ----------
    grad_output : [T, H], dtype of x.
    saved : ``result.saved`` of the forward call with this config. A ``z`` of None is recomputed, with the same
        bits.
    grad_losses : [3], router dtype: the gradient of ``result.losses``; the third entry (the entropy, a
        statistic) is ignored. None is zeros.
    w_up_grad, w_down_grad : float32 (float64 for float64 x), shapes of w_up and w_down: the weight's gradient
        is added to it, unrounded, and the result has None in its place. After an error in the middle of the
        call, such as OutOfMemoryError, it may have been added or not.

    Raises what ``moe_forward`` raises for arrays that do not fit, and UnsupportedError for what a forward
    call with ``save_for_backward=False`` left.
    """
