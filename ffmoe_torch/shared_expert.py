"""The expert that every token visits: one dense GLU block."""

import math
from collections.abc import Callable
from functools import partial
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .dense_glu import Spared, serves, start_glu
from .side_stream import Beside

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu_squared": lambda gate: F.relu(gate).square(),
}


class SharedExpert(nn.Module):
    """x [*, H] -> [*, H]: ``w_down (act(gate) * up)`` with ``[gate, up] = w_up x``.

    ``w_up`` is [2J, H], gate rows first, and ``w_down`` [H, J], where J is the width of all shared experts
    side by side: S experts of width I are one of width S*I.

    In 16 bits on a GPU its products are the runtime's, which are fewer and keep less for backward; elsewhere torch's.
    """

    def __init__(
        self,
        d_model: int,
        intermediate: int,
        activation: str = "swiglu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.w_up = nn.Parameter(torch.empty(2 * intermediate, d_model, device=device, dtype=dtype))
        self.w_down = nn.Parameter(torch.empty(d_model, intermediate, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform with a=sqrt(5), as ``nn.Linear``."""
        for weight in (self.w_up, self.w_down):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        if serves(x, self.w_up, self.w_down):
            return start_glu(x, self.w_up, self.w_down, self.activation)()
        gate, up = F.linear(x, self.w_up).chunk(2, dim=-1)
        return F.linear(_ACTIVATIONS[self.activation](gate) * up, self.w_down)

    def extra_repr(self) -> str:
        d_model, intermediate = self.w_down.shape
        return f"d_model={d_model}, intermediate={intermediate}, activation={self.activation!r}"


Join = Callable[[], Tensor]


def on_a_side_stream(expert: nn.Module, x: Tensor) -> Join:
    """Launches the expert beside what the caller launches until ``output = join()``.

    ``join`` computes it on a CPU, in a compiled graph, which orders its work itself, and where it is another module
    than ours, or hooks are to see its call. So it does in training where the products are torch's: autograd would run
    their backward on the side stream, too, and let go of what it reads while the origin is at other work.
    """
    if not x.is_cuda or torch.compiler.is_compiling() or not _is_ours(expert):
        return lambda: expert(x)
    on_the_runtime = serves(x, expert.w_up, expert.w_down)
    if not on_the_runtime and torch.is_grad_enabled():
        return lambda: expert(x)
    beside = Beside(x.device)
    if on_the_runtime:
        finish = start_glu(x, expert.w_up, expert.w_down, expert.activation, beside=beside, whole=True)
    else:
        finish = _start_module(beside, expert, x)

    def join() -> Tensor:
        beside.join()
        return finish()

    return join


def _start_module(beside: Beside, module: nn.Module, x: Tensor) -> Join:
    """A call of torch's operations, whose memory is the side stream's."""
    output: Tensor = beside.run(module, x)
    output.record_stream(beside.origin)
    return lambda: output


class BesideExchanges:
    """A shared expert of a layer whose experts are spread over ranks, in parts that run beside the layer's exchanges.

    On a GPU the exchanges have a stream of their own. The up-projection runs on another: it begins before the host
    knows what to send, and must not keep the tokens waiting. The rest is launched on the caller's stream; all of it is
    where the expert's products are not the runtime's, or hooks are to see its call. On a CPU ``join`` computes it.
    """

    output: Tensor | None = None  # once all of it has been launched

    def __init__(self, expert: nn.Module, x: Tensor) -> None:
        self._expert = expert
        self._x = x
        self._launch_rest: Callable[[], Tensor] | None = None
        self._beside: Beside | None = None

    def start(self, spared: Spared) -> None:
        """Launches what can run until the tokens have crossed."""
        expert, x = self._expert, self._x
        if not x.is_cuda:
            return
        self._launch_rest = partial(expert, x)
        if _is_ours(expert) and serves(x, expert.w_up, expert.w_down):
            self._beside = Beside(x.device)
            self._launch_rest = start_glu(
                x, expert.w_up, expert.w_down, expert.activation, spared, self._beside
            )

    def arrive(self) -> None:
        """After it, on the caller's stream, comes what wants the multiprocessors for itself."""
        if self._beside is not None:
            self._beside.join()

    def finish(self) -> None:
        """Launches what can run until the rows are home."""
        if self._launch_rest is not None:
            self.output = self._launch_rest()

    def join(self) -> Tensor:
        output: Tensor = self._expert(self._x) if self.output is None else self.output
        return output


def _is_ours(expert: nn.Module) -> TypeGuard[SharedExpert]:
    """Whether a call of the expert is one of ``SharedExpert.forward`` and nothing else."""
    own = isinstance(expert, SharedExpert) and type(expert).forward is SharedExpert.forward
    return own and "forward" not in vars(expert) and not _watched(expert)


def _watched(module: nn.Module) -> bool:
    """Whether a call of the module is more than one of its ``forward``."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or module._compiled_call_impl is not None
        or _has_any_global_hook()
    )
