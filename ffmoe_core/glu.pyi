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
) -> tuple[Any, Any]: ...
def glu_down(
    a: Any, w_down: Any, *, out: Any = None, spared: int = 0, spared_flop: float = math.inf
) -> Any: ...
def glu_down_backward(
    grad_output: Any,
    z: Any,
    w_down: Any,
    activation: str = "swiglu",
    *,
    weight_grad: bool = True,
    spared: int = 0,
    spared_flop: float = math.inf,
) -> tuple[Any, Any]: ...
def glu_up_backward(
    dz: Any, x: Any, w_up: Any, *, x_grad: bool = True, weight_grad: bool = True
) -> tuple[Any, Any]: ...
