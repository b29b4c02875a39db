import math
from typing import Any

def glu_up(
    x: Any,
    w_up: Any,
    activation: str = "swiglu",
    *,
    keep_z: bool = True,
    out: tuple[Any, Any | None] | None = None,
    spared: int = 0,
    spared_flop: float = math.inf,
) -> tuple[Any, Any]:
    """The first half of a dense GLU block: ``z = x @ w_up.T`` and ``a = act(z[:, :J]) * z[:, J:]``.

    x [T, H] of any float dtype, T may be 0; w_up [2J, H], dtype of x, gate rows first, then up rows;
    ``activation``: "swiglu", "geglu" (tanh approximation) or "relu_squared". Returns (a [T, J], z [T, 2J]), both
    of x's dtype; z is what backward needs, and None with ``keep_z=False``. Accumulates in float32 (float64), and
    a comes from the unrounded z. ``out``: arrays for both, (a, z), which are returned; z None with ``keep_z=False``.
    Nothing waits for the device.

    ``spared``: multiprocessors of a Hopper GPU left to other work, such as an exchange between GPUs, during the first
    ``spared_flop`` floating-point operations, an estimate of what fits until that work is done. The rest is a second
    launch that takes all multiprocessors. Other devices ignore it.

    Raises ShapeError, DTypeError, DeviceError, LayoutError for arrays that do not fit, ConfigError for an unknown
    activation, an ``out`` that is no such pair, and a ``spared`` or ``spared_flop`` out of range, OutOfMemoryError, and
    MissingDependencyError for arrays on a GPU without CuPy.
    """

def glu_down(a: Any, w_down: Any, *, out: Any = None, spared: int = 0, spared_flop: float = math.inf) -> Any:
    """The second half: ``a @ w_down.T``, [T, H] in the dtype of a, for a [T, J] and w_down [H, J].

    ``out``: [T, H], where to write it. See ``glu_up`` for the rest.
    """

def glu_down_backward(
    grad_output: Any,
    z: Any,
    w_down: Any,
    activation: str = "swiglu",
    *,
    weight_grad: bool = True,
    spared: int = 0,
    spared_flop: float = math.inf,
) -> tuple[Any, Any]:
    """Gradients of ``glu_down(a, w_down)`` for the z that a is made of: (dz [T, 2J], dw_down [H, J]).

    grad_output [T, H]; z [T, 2J] as ``glu_up`` gave it, w_down [H, J], both of grad_output's dtype, and so are the
    results. a is computed again from z. dw_down is None with ``weight_grad=False``; its product ignores ``spared``.

    See ``glu_up`` for the rest.
    """

def glu_up_backward(
    dz: Any, x: Any, w_up: Any, *, x_grad: bool = True, weight_grad: bool = True
) -> tuple[Any, Any]:
    """Gradients of ``z`` in ``glu_up(x, w_up)``: (dx [T, H], dw_up [2J, H]), in the dtype of x.

    dz [T, 2J] as ``glu_down_backward`` gives it. dx is None with ``x_grad=False``, dw_up with ``weight_grad=False``.

    Raises the errors of ``glu_up``.
    """
