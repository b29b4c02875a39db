from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from .comm import Communicator
from .config import MoEConfig
from .ep_types import Combining, Dispatched, ExpertParallelResult
from .moe import MoEGrads

_T = TypeVar("_T")

LOSS_SCOPES: tuple[str, ...]

def expert_range(num_experts: int, ep_size: int, ep_rank: int) -> range: ...

class aborting(AbstractContextManager[aborting]):  # noqa: N801
    """Errors that pass, other than CommError, are reported to the other ranks of ``comm``."""

    def __init__(self, comm: Communicator) -> None: ...
    def __exit__(self, *error: Any) -> None: ...

class ExpertParallel:
    comm: Communicator
    config: MoEConfig
    layer: str
    loss_scope: str
    ep_chunks: int
    has_losses: bool
    experts: range

    def __init__(
        self,
        comm: Communicator,
        config: MoEConfig,
        *,
        layer: str = "",
        loss_scope: str = "group",
        ep_chunks: int = 1,
        agree_on: Mapping[str, object] | None = None,
    ) -> None: ...
    def forward(
        self,
        x: Any,
        gate_weight: Any,
        w_up: Any,
        w_down: Any,
        *,
        router_input: Any = None,
        expert_bias: Any = None,
        valid_mask: Any = None,
        save_for_backward: bool = True,
    ) -> ExpertParallelResult: ...
    def backward(
        self,
        grad_output: Any,
        result: ExpertParallelResult,
        x: Any,
        gate_weight: Any,
        w_up: Any,
        w_down: Any,
        *,
        router_input: Any = None,
        grad_losses: Any = None,
        w_up_grad: Any = None,
        w_down_grad: Any = None,
    ) -> MoEGrads: ...

    # --- the three parts of forward, and their gradients: for what may stand between them ---

    def dispatch(
        self,
        x: Any,
        gate_weight: Any,
        *,
        router_input: Any = None,
        expert_bias: Any = None,
        valid_mask: Any = None,
        meanwhile: Callable[[int, float], object] | None = None,
    ) -> Dispatched: ...
    def run_experts(
        self, received: Any, dispatched: Dispatched, w_up: Any, w_down: Any, *, save_for_backward: bool = True
    ) -> tuple[Any, Any]: ...
    def combine(self, rows: Any, dispatched: Dispatched) -> Any: ...
    def combine_backward(self, grad_output: Any, dispatched: Dispatched) -> Any: ...

    # --- both in halves: what is launched between them, on the same stream, runs beside the exchange ---

    def start_combine(self, rows: Any, dispatched: Dispatched) -> Combining: ...
    def finish_combine(self, combining: Combining, dispatched: Dispatched, *, added: Any = None) -> Any: ...
    def start_combine_backward(self, grad_output: Any, dispatched: Dispatched) -> Combining: ...
    def finish_combine_backward(self, combining: Combining) -> Any: ...
    def run_experts_backward(
        self, d_rows: Any, received: Any, z: Any, dispatched: Dispatched, w_up: Any, w_down: Any
    ) -> tuple[Any, Any, Callable[..., Callable[[], tuple[Any, Any]]]]: ...
    def dispatch_backward(
        self,
        d_received: Any,
        d_weights: Any,
        dispatched: Dispatched,
        x: Any,
        gate_weight: Any,
        *,
        router_input: Any = None,
        grad_losses: Any = None,
        meanwhile: Callable[[], Callable[[], _T]] | None = None,
    ) -> tuple[Any, Any, Any, _T | None]: ...
