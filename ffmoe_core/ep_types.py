"""What passes from one part of a layer whose experts are spread over ranks to the next, and from forward to backward.

T tokens of this rank, width W (H at the experts), K experts a token, E experts in the group; N tokens that came to this
rank, each with S slots for its experts here. What is "Any" is an array of the caller's kind, or an Array where that is
said.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .comm.communicator import Transfer


class Sizes(NamedTuple):
    """How much one call exchanges, known on the host."""

    tokens: int  # T of this rank
    sent: tuple[int, ...]  # tokens to each rank, chunk by chunk
    received: tuple[int, ...]  # tokens from each rank, chunk by chunk
    rows: int  # of this rank's experts


class Underway:
    """With chunks: what one part of a call has started, and the next waits for."""

    def __init__(self) -> None:
        self.arriving: Sequence[Transfer] = ()  # of each chunk's rows to the experts, or none left
        self.rows: Any = None  # Array of rows that are on their way home
        self.landing: Sequence[Any] = ()  # Arrays where they and what goes with them land
        self.returning: Sequence[Transfer] = ()  # of each chunk
        self.weighing: tuple[Any, Transfer] | None = None  # Array where the weights' gradients land, and when

    def take_arriving(self) -> Sequence[Transfer]:
        """Of each chunk's rows to the experts, for the caller to wait for; none if they were taken before."""
        taken, self.arriving = self.arriving, ()
        return taken


class Dispatched(NamedTuple):
    """What ``ExpertParallel.dispatch`` returns: the tokens that came to this rank, and who goes where.

    Backward reads no more of it than ``sizes``, ``underway`` and these: ``combine_backward`` sending,
    ``run_experts_backward`` receiving, ``dispatch_backward`` logits, routing, balance, sending and pair_slots.
    Losses of the group, and what is marked *, are there when ``combine`` has been called.
    """

    # tokens, by chunk and the rank they came from; with chunks still on their way
    received: Any  # [N, W] dtype of x
    weights: Any  # [N, S] router dtype: of each token's experts here, as far as it has any
    losses: Any  # [3] router dtype: aux loss, z-loss (each times its coefficient), router entropy in nats; *
    logits: Any  # [T, E] router dtype
    routing: Any  # uint8 [n]: RoutingLayout of this rank's T tokens and the group's E experts
    # the group's expert_offsets and tokens_per_expert; None for "local" losses; *
    balance: Any  # int32 [2E + 1]
    # what the losses are made of, of this rank and of the group *; None likewise
    sums: Any  # float64 [2, E + 2]
    sending: Any  # uint8 [n]: RoutingLayout of this rank's T tokens and the ranks, in each chunk
    pair_slots: Any  # int32 [T, K]: where a pair stands among the slots sent, or -1
    # RoutingLayout of N tokens with S slots and this rank's experts, each in chunks
    receiving: Any  # uint8 [n]
    sizes: Sizes
    underway: Underway | None = None  # with chunks: exchanges that the next part waits for


class Combining(NamedTuple):
    """What ``ExpertParallel.start_combine`` and ``start_combine_backward`` return: an exchange of rows under way."""

    # on the tokens' side: in forward they land here, in backward they leave from here
    packed: Any  # [num_sent, W]
    rows: Any  # [N, W] on the experts' side, the other way round
    transfers: Sequence[Transfer]  # that the second half waits for


class ExpertParallelResult(NamedTuple):
    """What ``ExpertParallel.forward`` returns."""

    output: Any  # [T, H]
    losses: Any  # [3], as Dispatched.losses
    dispatched: Dispatched
    z: Any  # [rows, 2I] pre-activations of this rank's experts, or None
