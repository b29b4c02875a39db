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

    def take_arriving(self) -> Sequence[Transfer]:
        """Of each chunk's rows to the experts, for the caller to wait for; none if they were taken before."""

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

def expert_range(num_experts: int, ep_size: int, ep_rank: int) -> range:
    """The experts of a rank: runs as equal as can be, the longer ones on the first ranks.

    Raises ConfigError for a rank that is not one of ``ep_size``.
    """

class aborting(AbstractContextManager[aborting]):  # noqa: N801
    """Errors that pass, other than CommError, are reported to the other ranks of ``comm``."""

    def __init__(self, comm: Communicator) -> None: ...
    def __exit__(self, *error: Any) -> None: ...

class ExpertParallel:
    """One layer whose experts are spread over the ranks of a communicator.

    Parameters
    ----------
    comm : the group. Every rank makes its layers, and calls their methods, in the same order, those without
        tokens among them.
    config : the options of the whole layer; ``num_experts`` is that of the group.
    layer : a name for error messages.
    loss_scope : "group": the losses and the balance are of all ranks' tokens, the same on every rank.
        "local": of this rank's tokens.
    ep_chunks : chunks of about the same length that each rank's tokens are cut into. While one is at the experts,
        the next crosses. ``run_experts`` then sends rows home itself, chunk by chunk, so that ``combine`` accepts only
        what it returned, and ``dispatch_backward`` only what ``run_experts_backward`` returned. Sums are the same; an
        expert's rows stand in another order, chunk by chunk.
    agree_on : further settings, by name, that must be the same on every rank.

    ``experts`` is the range of this rank's experts. Tokens are dropped where they come from: a capacity bounds
    what each rank sends an expert, ``capacity_factor`` by that rank's own T.

    All gradients are those of the sum over ranks of each rank's own objective: those of w_up and w_down are
    complete, those of gate_weight are this rank's part of a sum over ranks. Losses of the group are a part of
    every rank's objective.

    Raises
    ------
    ConfigError : the ranks differ in an option or, in the first call with a dtype, in that of x; the message names
        it with every rank's value. More ranks than experts; an unknown ``loss_scope``; an ``ep_chunks`` that is no
        whole number of at least 1, or with which a rank has more than 1024 pairs of chunk and expert, or of chunk and
        rank. With chunks, ``combine`` and ``dispatch_backward`` of other rows than the experts', or ahead of them.
    CommError : from any method: a rank is missing or has failed; see ``Communicator``. An error on this rank
        becomes a CommError on the others.
    """

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
    ) -> ExpertParallelResult:
        """The weighted output of the group's experts for this rank's tokens.

        As ``moe_forward``, with this rank's experts only: w_up [experts, 2I, H] and w_down [experts, H, I].
        T may differ from rank to rank and be 0.
        """

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
    ) -> MoEGrads:
        """Every gradient of ``forward``. As ``moe_backward``; see the class for what the gradients are of.

        A ``result.z`` of None is recomputed, also after ``save_for_backward=False``. Raises ConfigError where
        grad_losses is None and the losses are the group's.
        """

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
    ) -> Dispatched:
        """Route this rank's tokens, x [T, W], and send each to the ranks of its experts.

        W is d_model, unless the gate reads ``router_input`` [T, d_model]: then x can have any width. ``meanwhile``
        is called while the host has yet to wait for the counts, to launch what can be computed until the tokens are
        there: with the ``spared`` and ``spared_flop`` of ``glu_up`` that leave this exchange room, and those of
        combine. On a stream of its own: the tokens leave when x's stream has done what was launched on it by then.
        """

    def run_experts(
        self, received: Any, dispatched: Dispatched, w_up: Any, w_down: Any, *, save_for_backward: bool = True
    ) -> tuple[Any, Any]:
        """``(rows [N, H], z)``: each received token's weighted sum over its experts on this rank."""

    def combine(self, rows: Any, dispatched: Dispatched) -> Any:
        """[T, W]: rows [N, W] back where their tokens came from, and summed by token.

        With losses of the group it also sums what they are made of over the ranks, and fills ``dispatched.losses`` and
        ``dispatched.balance``.
        """

    def combine_backward(self, grad_output: Any, dispatched: Dispatched) -> Any:
        """[N, W] from grad_output [T, W]."""

    # --- both in halves: what is launched between them, on the same stream, runs beside the exchange ---

    def start_combine(self, rows: Any, dispatched: Dispatched) -> Combining:
        """Sends rows [N, W] home."""

    def finish_combine(self, combining: Combining, dispatched: Dispatched, *, added: Any = None) -> Any:
        """[T, W], as ``combine``, plus ``added`` [T, W] of the rows' dtype, such as a shared expert's output."""

    def start_combine_backward(self, grad_output: Any, dispatched: Dispatched) -> Combining:
        """Sends the gradients [T, W] to where the rows came from."""

    def finish_combine_backward(self, combining: Combining) -> Any:
        """[N, W], as ``combine_backward``."""

    def run_experts_backward(
        self, d_rows: Any, received: Any, z: Any, dispatched: Dispatched, w_up: Any, w_down: Any
    ) -> tuple[Any, Any, Callable[..., Callable[[], tuple[Any, Any]]]]:
        """``(d_received [N, H], d_weights [N, S], weight_gradients)``.

        ``weight_gradients(w_up_grad=None, w_down_grad=None, scale=1.0)`` computes ``(dw_up, dw_down)``, times
        ``scale``: left to the caller, so that it can be done while d_received is on its way. It launches what is to
        run beside that, and returns a function that launches the rest and returns them. Arrays that it is given are
        added to, and None comes in their place, as in ``moe_backward``.
        """

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
    ) -> tuple[Any, Any, Any, _T | None]:
        """``(dx, d_router_input, d_gate_weight, result)``; d_router_input may be None.

        ``finish = meanwhile()`` is called while d_received is on its way, and ``result = finish()`` when it is there.
        """
