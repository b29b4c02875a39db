"""A dense GLU block on the runtime's kernels, for torch's autograd.

Two functions, so that other work can be launched between them. What they keep for backward is their inputs and z, the
up-projection before its activation: a, what the down-projection reads, is computed again from it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ffmoe_core import glu_down, glu_down_backward, glu_up, glu_up_backward

from .functional import as_tokens, autocast_all, no_second_derivative, nothing_between
from .side_stream import after, beside

DTYPES = (torch.bfloat16, torch.float16)


class Spared(NamedTuple):
    """What products leave to an exchange that they run beside; see ``ffmoe_core.glu_up``."""

    multiprocessors: int = 0
    flop: float = 0.0  # of each product, in forward and in backward


NOTHING_SPARED = Spared()


def serves(x: Tensor, w_up: Tensor, w_down: Tensor) -> bool:
    """Whether the runtime can take the place of torch's operations, and is worth it.

    It is in 16 bits on a GPU. Where a compiler, a mode or a transform wants to see operations, they stay torch's.
    """
    if torch.compiler.is_compiling() or not x.is_cuda or forward_ad._current_level >= 0:
        return False
    tensors = (x, w_up, w_down)
    if not torch.is_autocast_enabled("cuda"):
        return x.dtype in DTYPES and nothing_between(tensors)
    dtype = torch.get_autocast_dtype("cuda")
    with torch.autocast("cuda", enabled=False):  # it alone is no hindrance, as start_glu() casts
        return dtype in DTYPES and x.dtype != torch.float64 and nothing_between(tensors)


def start_glu(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    spared: Spared = NOTHING_SPARED,
    side: torch.cuda.Stream | None = None,
    origin: torch.cuda.Stream | None = None,
) -> Callable[[], Tensor]:
    """Launches the up-projection of x [*, H]; what it returns launches the rest, and gives the output [*, H].

    w_up [2J, H] and w_down [H, J] of x's dtype; under autocast all are cast to its dtype. ``spared`` is so by the
    up-projection, by the rest, and in backward by the first product, that of dz. ``side`` is a stream beside the
    current one for the up-projection, which the current one has to wait for before the rest; backward is on the current
    one. ``origin`` is the stream that the current one is beside, if it is. Raises the errors of ``glu_up`` and
    ``glu_down``. A second derivative raises UnsupportedError.
    """
    shape = x.shape
    tokens, up, down = (
        tensor.contiguous() for tensor in autocast_all(as_tokens(x, "x", w_up.shape[1]), w_up, w_down)
    )
    if not torch.is_grad_enabled() or not (tokens.requires_grad or up.requires_grad or down.requires_grad):
        a, _ = beside(
            side, partial(glu_up, activation=activation, keep_z=False, **_options(spared)), tokens, up
        )
        return lambda: glu_down(a, down, **_options(spared)).view(shape)
    z, a = _Up.apply(tokens, up, activation, spared, side, origin)
    return lambda: _Down.apply(z, a, down, activation, spared, origin).view(shape)


def _options(spared: Spared) -> dict[str, Any]:
    return {"spared": spared.multiprocessors, "spared_flop": spared.flop}


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_up: Tensor,
        activation: str,
        spared: Spared,
        side: torch.cuda.Stream | None,
        origin: torch.cuda.Stream | None,
    ) -> tuple[Tensor, Tensor]:
        a, z = beside(side, partial(glu_up, activation=activation, **_options(spared)), x, w_up)
        ctx.origin = origin
        ctx.save_for_backward(x, w_up)
        ctx.mark_non_differentiable(a)  # its gradient is part of z's
        ctx.set_materialize_grads(False)
        return z, a

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dz, _ = grads
        if dz is None:
            return (None,) * 6
        after(ctx.origin)
        x, w_up = ctx.saved_tensors
        x_grad, weight_grad, *_ = ctx.needs_input_grad
        function = partial(glu_up_backward, x_grad=x_grad, weight_grad=weight_grad)
        return *_gradients(function, dz, x, w_up), None, None, None, None


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        a: Tensor,
        w_down: Tensor,
        activation: str,
        spared: Spared,
        origin: torch.cuda.Stream | None,
    ) -> Tensor:
        ctx.activation, ctx.spared, ctx.origin = activation, spared, origin
        ctx.save_for_backward(z, w_down)
        ctx.set_materialize_grads(False)
        return glu_down(a, w_down, **_options(spared))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (d_out,) = grads
        if d_out is None:
            return (None,) * 6
        after(ctx.origin)
        z, w_down = ctx.saved_tensors
        function = partial(
            glu_down_backward,
            activation=ctx.activation,
            weight_grad=ctx.needs_input_grad[2],
            **_options(ctx.spared),
        )
        dz, dw_down = _gradients(function, d_out.contiguous(), z, w_down)
        return dz, None, dw_down, None, None, None


def _gradients(function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """``function(*tensors)``, with a graph where autograd wants one (create_graph)."""
    found: tuple[Tensor | None, Tensor | None] = (
        _Gradients.apply(function, *tensors) if torch.is_grad_enabled() else function(*tensors)
    )
    return found


class _Gradients(torch.autograd.Function):
    """Is there to refuse a second derivative."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *tensors: Tensor) -> Any:
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise no_second_derivative()
