from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

from .comm import Communicator, Transfer
from .config import MoEConfig
from .moe import MoEGrads

_T = TypeVar("_T")

LOSS_SCOPES: tuple[str, ...]

class Sizes(NamedTuple):
    """How much one call exchanges, known on the host."""

    tokens: int  # T of this rank
    sent: tuple[int, ...]  # tokens to each rank, chunk by chunk
    received: tuple[int, ...]  # tokens from each rank, chunk by chunk
    rows: int  # of this rank's experts

class Dispatched(NamedTuple):
    """What ``ExpertParallel.dispatch`` returns: the tokens that came to this rank, and who goes where.

    Backward reads no more of it than ``sizes``, ``underway`` and these: ``combine_backward`` sending,
    ``run_experts_backward`` receiving, ``dispatch_backward`` logits, routing, balance, sending and pair_slots.
    Losses of the group, and what is marked *, are there when ``combine`` has been called.
    """

    received: (
        Any  # [N, W] dtype of x: tokens, by chunk and the rank they came from; with chunks still on their way
    )
    weights: Any  # [N, S] router dtype: of each token's experts here, as far as it has any
    losses: Any  # [3] router dtype: aux loss, z-loss (each times its coefficient), router entropy in nats; *
    logits: Any  # [T, E] router dtype
    routing: Any  # uint8 [n]: RoutingLayout of this rank's T tokens and the group's E experts
    balance: (
        Any  # int32 [2E + 1]: the group's expert_offsets and tokens_per_expert; None for "local" losses; *
    )
    sums: (
        Any  # float64 [2, E + 2]: what the losses are made of, of this rank and of the group *; None likewise
    )
    sending: Any  # uint8 [n]: RoutingLayout of this rank's T tokens and the ranks, in each chunk
    pair_slots: Any  # int32 [T, K]: where a pair stands among the slots sent, or -1
    receiving: (
        Any  # uint8 [n]: RoutingLayout of N tokens with S slots and this rank's experts, each in chunks
    )
    sizes: Sizes
    underway: Underway | None = None  # with chunks: exchanges that the next part waits for

class Underway:
    """With chunks: what one part of a call has started, and the next waits for."""

    def take_arriving(self) -> Sequence[Transfer]: ...

class Combining(NamedTuple):
    """An exchange of rows that is under way."""

    packed: (
        Any  # [num_sent, W] on the tokens' side: in forward they land here, in backward they leave from here
    )
    rows: Any  # [N, W] on the experts' side, the other way round
    transfers: Any

class ExpertParallelResult(NamedTuple):
    """What ``ExpertParallel.forward`` returns."""

    output: Any  # [T, H]
    losses: Any  # [3], as Dispatched.losses
    dispatched: Dispatched
    z: Any  # [rows, 2I] pre-activations of this rank's experts, or None

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
