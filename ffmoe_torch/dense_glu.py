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
from ffmoe_core.errors import OutOfMemoryError

from .functional import as_tokens
from .side_stream import Beside
from .surroundings import autocast_all, no_second_derivative, nothing_between

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
    beside: Beside | None = None,
    whole: bool = False,
) -> Callable[[], Tensor]:
    """Launches the up-projection of x [*, H]; what it returns launches the rest, and gives the output [*, H].

    w_up [2J, H] and w_down [H, J] of x's dtype; under autocast all are cast to its dtype. ``spared`` is so by the
    up-projection, by the rest, and in backward by the first product, that of dz. The up-projection goes ``beside`` the
    current stream, if that is given, and with ``whole`` the rest at once, too: join it before the call of what is
    returned. Backward is on the current stream. Raises the errors of ``glu_up`` and ``glu_down``. A second derivative
    raises UnsupportedError.
    """
    shape = x.shape
    tokens, up, down = (
        tensor.contiguous() for tensor in autocast_all(as_tokens(x, "x", w_up.shape[1]), w_up, w_down)
    )
    if not torch.is_grad_enabled() or not (tokens.requires_grad or up.requires_grad or down.requires_grad):
        a, _ = _up(beside, tokens, up, activation, spared, keep_z=False)
        finish = _start_down(beside if whole else None, a, down, spared)
        return lambda: finish().view(shape)
    z, a = _Up.apply(tokens, up, activation, spared, beside)
    finish = _start_down(beside if whole else None, a, down, spared)
    # not before z is there for the current stream, too: hooks for saved tensors may read it
    return lambda: _Down.apply(z, down, activation, spared, finish).view(shape)


def _options(spared: Spared) -> dict[str, Any]:
    return {"spared": spared.multiprocessors, "spared_flop": spared.flop}


def _up(
    beside: Beside | None, x: Tensor, w_up: Tensor, activation: str, spared: Spared, *, keep_z: bool
) -> tuple[Tensor, Tensor | None]:
    """``glu_up``; beside the current stream in memory of that."""
    function: Callable[..., Any] = partial(glu_up, activation=activation, keep_z=keep_z, **_options(spared))
    if beside is not None:
        rows, columns = len(x), len(w_up)
        out = _room(x, rows, columns // 2), _room(x, rows, columns) if keep_z else None
        function = partial(beside.run, partial(function, out=out))
    found: tuple[Tensor, Tensor | None] = function(x, w_up)
    return found


def _start_down(beside: Beside | None, a: Tensor, w_down: Tensor, spared: Spared) -> Callable[[], Tensor]:
    """``glu_down``, launched when what is returned is called; beside the current stream at once, in memory of that."""
    function = partial(glu_down, **_options(spared))
    if beside is None:
        return partial(function, a, w_down)
    output = beside.run(partial(function, out=_room(a, len(a), len(w_down))), a, w_down)
    return lambda: output


def _room(like: Tensor, rows: int, columns: int) -> Tensor:
    """Memory of the current stream, as the runtime would have of it: with its error where there is none."""
    try:
        return like.new_empty(rows, columns)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(str(error)) from error


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_up: Tensor, activation: str, spared: Spared, beside: Beside | None
    ) -> tuple[Tensor, Tensor]:
        a, z = _up(beside, x, w_up, activation, spared, keep_z=True)
        assert z is not None
        ctx.save_for_backward(x, w_up)
        ctx.mark_non_differentiable(a)  # its gradient is part of z's
        ctx.set_materialize_grads(False)
        return z, a

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dz, _ = grads
        if dz is None:
            return (None,) * 5
        x, w_up = ctx.saved_tensors
        x_grad, weight_grad, *_ = ctx.needs_input_grad
        function = partial(glu_up_backward, x_grad=x_grad, weight_grad=weight_grad)
        return *gradients(function, dz, x, w_up), None, None, None


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, w_down: Tensor, activation: str, spared: Spared, finish: Callable[[], Tensor]
    ) -> Tensor:
        ctx.activation, ctx.spared = activation, spared
        ctx.save_for_backward(z, w_down)
        ctx.set_materialize_grads(False)
        return finish()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (d_out,) = grads
        if d_out is None:
            return (None,) * 5
        z, w_down = ctx.saved_tensors
        function = partial(
            glu_down_backward,
            activation=ctx.activation,
            weight_grad=ctx.needs_input_grad[1],
            **_options(ctx.spared),
        )
        return *gradients(function, d_out.contiguous(), z, w_down), None, None, None


def gradients(function: Callable[..., Any], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """``function(*tensors)``; where autograd wants a graph of it (create_graph), one that refuses a second derivative.

    All that the gradients depend on is to be among the tensors.
    """
    found: tuple[Tensor | None, ...] = (
        _Gradients.apply(function, *tensors) if torch.is_grad_enabled() else function(*tensors)
    )
    return found


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *tensors: Tensor | None) -> Any:
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise no_second_derivative()
