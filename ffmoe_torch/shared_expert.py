"""The expert that every token visits: one dense GLU block."""

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu_squared": lambda gate: F.relu(gate).square(),
}


class SharedExpert(nn.Module):
    """x [*, H] -> [*, H]: ``w_down (act(gate) * up)`` with ``[gate, up] = w_up x``.

    ``w_up`` is [2J, H], gate rows first, and ``w_down`` [H, J], where J is the width of all shared experts
    side by side: S experts of width I are one of width S*I.
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
        gate, up = F.linear(x, self.w_up).chunk(2, dim=-1)
        return F.linear(_ACTIVATIONS[self.activation](gate) * up, self.w_down)

    def extra_repr(self) -> str:
        d_model, intermediate = self.w_down.shape
        return f"d_model={d_model}, intermediate={intermediate}, activation={self.activation!r}"


def beside(expert: SharedExpert, x: Tensor) -> Callable[[], Callable[[], Tensor]]:
    """``start = beside(expert, x)``, ``join = start()``, ``output = join()``.

    On a GPU the expert runs on a side stream, beside all that comes between the last two calls. It waits for what
    was launched before the first one, where x is there, and not for what was launched before the second: an
    exchange, for example. On a CPU, and in a compiled graph, which orders its work itself, it is computed by the
    last.
    """
    if not x.is_cuda or torch.compiler.is_compiling():
        return lambda: lambda: expert(x)
    current, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    ready = current.record_event()

    def start() -> Callable[[], Tensor]:
        side.wait_event(ready)
        # Backward reads x on the side stream and may be the last to do so.
        x.record_stream(side)
        with torch.cuda.stream(side):
            output = expert(x)

        def join() -> Tensor:
            current.wait_stream(side)
            output.record_stream(current)
            return output

        return join

    return start


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
