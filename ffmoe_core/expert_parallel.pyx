"""A layer whose experts are spread over ranks: dispatch, experts, combine, and the way back.

Three plans say who goes where, all of them made by the same stable sort:
    routing    a token's pairs, to the experts of the whole group; here tokens are dropped, too
    sending    a token, once to each rank that holds any of its experts
    receiving  the pairs of the tokens that came, to the experts of this rank
A token crosses with its slots: for each of its experts on that rank the number there, and the weight. The
experts' products read the received tokens in place, their rows are summed there in the order of the slots, and
one row goes back for each that came. Backward goes the same ways: what was gathered is summed and vice versa.

What is exchanged, and in which order, is the same on every rank, whatever its number of tokens.

On a GPU an exchange keeps multiprocessors busy (``Communicator.multiprocessors``). A product takes all of them, and
stays until it is done: an exchange that comes later would begin when it ends. So as many experts' products as an
exchange takes leave them free (``Space.spared``), and the others come after them.

With ``ep_chunks`` a rank's tokens are cut into as many runs, which cross one after the other: while one is at the
experts the next is on its way there, and the one before on its way home. Packed and received rows stand chunk by chunk.
What goes with the tokens crosses ahead of all of them, and so the receiving plan is of all chunks at once: in it an
expert's rows are one run, cut into chunks. The products of rows take a chunk of each expert, the weight gradients all.
"""

import json
from dataclasses import asdict
from typing import Any, NamedTuple

from libc.math cimport ceil
from libc.stdint cimport int64_t

from .arrays cimport FLOAT64, INT32, UINT8, Array, Space, itemsize, space_of, view
from .checks cimport (
    bias_of,
    check_device,
    check_dtype,
    check_finite,
    check_floating,
    check_like,
    check_rows,
    check_shape,
    mask_of,
    router_dtype,
)
from .moe cimport RoutingParts, sums_of

from .backend import backend_for
from .checks import check_config, check_type
from .comm.communicator import Communicator, Step
from .config import MAX_EXPERTS, MoEConfig
from .errors import CommError, ConfigError
from .moe import MoEGrads, check_capacity, packed_layout

LOSS_SCOPES = ("group", "local")
# What a GPU multiplies in 16 bits while a byte crosses to another, in FLOP: 500 TFLOP/s and 250 GB/s (H200, NVLink).
FLOPS_A_BYTE = 2000.0
STEPS = (
    "counts", "dispatch", "combine", "losses",
    "combine backward", "weights backward", "losses backward", "dispatch backward",
)


class Sizes(NamedTuple):
    """How much one call exchanges, known on the host."""

    tokens: int  # T of this rank
    sent: tuple  # tokens to each rank, chunk by chunk
    received: tuple  # tokens from each rank, chunk by chunk
    rows: int  # of this rank's experts


class Dispatched(NamedTuple):
    """What ``ExpertParallel.dispatch`` returns."""

    received: Any  # [N, W]
    weights: Any  # [N, S] router dtype
    losses: Any  # [3] router dtype
    logits: Any  # [T, E] router dtype
    routing: Any  # uint8 [n]
    balance: Any  # int32 [2E + 1] or None
    sums: Any  # float64 [2, E + 2] or None
    sending: Any  # uint8 [n]
    pair_slots: Any  # int32 [T, K]
    receiving: Any  # uint8 [n]
    sizes: Sizes
    underway: Any = None  # Underway or None


class Combining(NamedTuple):
    """What ``ExpertParallel.start_combine`` and ``start_combine_backward`` return."""

    packed: Any  # [num_sent, W]: in backward what is sent, in forward where rows land
    rows: Any  # [N, W]: in backward where they land, in forward what is sent
    transfers: Any  # of what is on its way, and waited for by the second half


class Underway:
    """With chunks: what one part of a call has started, and the next waits for."""

    def __init__(self):
        self.arriving = ()  # Transfers of each chunk's rows to the experts, or none left
        self.rows = None  # Array of rows that are on their way home
        self.landing = ()  # Arrays where they and what goes with them land
        self.returning = ()  # Transfers of each chunk
        self.weighing = None  # (Array, Transfer): where the weights' gradients land, and when

    def take_arriving(self):
        """Of each chunk's rows to the experts, for the caller to wait for; none if they were taken before."""
        taken, self.arriving = self.arriving, ()
        return taken


class ExpertParallelResult(NamedTuple):
    """What ``ExpertParallel.forward`` returns."""

    output: Any  # [T, H]
    losses: Any  # [3] router dtype
    dispatched: Dispatched
    z: Any  # [rows, 2I] or None


def expert_range(num_experts, ep_size, ep_rank):
    """The experts of a rank: runs as equal as can be, the longer ones on the first ranks.

    Raises ConfigError for a rank that is not one of ``ep_size``.
    """
    if not 0 <= ep_rank < ep_size:
        raise ConfigError(f"ep_rank={ep_rank} must be at least 0 and less than ep_size={ep_size}")
    size, longer = divmod(num_experts, ep_size)
    first = ep_rank * size + min(ep_rank, longer)
    return range(first, first + size + (ep_rank < longer))


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

    def __init__(self, comm, config, *, layer="", loss_scope="group", ep_chunks=1, agree_on=None):
        check_type(comm, "comm", Communicator, "such as an MpiCommunicator or a NcclCommunicator")
        with aborting(comm):
            check_config(config, MoEConfig)
        self.comm = comm
        self.config = config
        self.layer = layer
        self.loss_scope = loss_scope
        self.ep_chunks = ep_chunks
        self.has_losses = config.aux_loss_coeff > 0 or config.z_loss_coeff > 0
        _check_agreement(
            comm,
            Step("configuration", layer),
            {
                **asdict(config),
                "loss_scope": loss_scope,
                "ep_chunks": ep_chunks,
                "timeout": comm.timeout,
                **(agree_on or {}),
            },
        )
        # what is wrong on some ranks only is an error of all by now
        if loss_scope not in LOSS_SCOPES:
            raise ConfigError(
                f"loss_scope={loss_scope!r} is unknown; known: {', '.join(map(repr, LOSS_SCOPES))}"
            )
        if config.num_experts < comm.size:
            raise ConfigError(
                f"num_experts={config.num_experts} is less than ep_size={comm.size}: each rank needs an expert"
            )
        _check_chunks(ep_chunks, config.num_experts, comm.size)
        self.experts = expert_range(config.num_experts, comm.size, comm.rank)
        self._plans = _Plans(config, comm.size, len(self.experts), ep_chunks)
        self._steps = {name: Step(name, layer) for name in STEPS}
        self._rows = set()  # (dtype, width) of x that the ranks have agreed on

    def agree_on_rows(self, dtype, width):
        """The ranks exchange bytes: that all mean the same by them is found out at the first call with such rows."""
        if (dtype, width) not in self._rows:
            _check_agreement(self.comm, Step("rows of x", self.layer), {"dtype": dtype, "width": width})
            self._rows.add((dtype, width))

    # --- the whole layer ---

    def forward(
        self, x, gate_weight, w_up, w_down, *,
        router_input=None, expert_bias=None, valid_mask=None, save_for_backward=True,
    ):
        """The weighted output of the group's experts for this rank's tokens.

        As ``moe_forward``, with this rank's experts only: w_up [experts, 2I, H] and w_down [experts, H, I].
        T may differ from rank to rank and be 0.
        """
        dispatched = self.dispatch(
            x, gate_weight, router_input=router_input, expert_bias=expert_bias, valid_mask=valid_mask
        )
        rows, z = self.run_experts(
            dispatched.received, dispatched, w_up, w_down, save_for_backward=save_for_backward
        )
        output = self.combine(rows, dispatched)
        return ExpertParallelResult(output, dispatched.losses, dispatched, z)

    def backward(
        self, grad_output, result, x, gate_weight, w_up, w_down, *,
        router_input=None, grad_losses=None, w_up_grad=None, w_down_grad=None,
    ):
        """Every gradient of ``forward``. As ``moe_backward``; see the class for what the gradients are of.

        A ``result.z`` of None is recomputed, also after ``save_for_backward=False``. Raises ConfigError where
        grad_losses is None and the losses are the group's.
        """
        dispatched = result.dispatched
        d_rows = self.combine_backward(grad_output, dispatched)
        d_received, d_weights, weight_gradients = self.run_experts_backward(
            d_rows, dispatched.received, result.z, dispatched, w_up, w_down
        )
        dx, d_router, d_gate, (dw_up, dw_down) = self.dispatch_backward(
            d_received, d_weights, dispatched, x, gate_weight,
            router_input=router_input, grad_losses=grad_losses,
            meanwhile=lambda: weight_gradients(w_up_grad, w_down_grad),
        )
        return MoEGrads(dx, d_router, d_gate, dw_up, dw_down)

    # --- dispatch ---

    def dispatch(
        self, x, gate_weight, *, router_input=None, expert_bias=None, valid_mask=None, meanwhile=None
    ):
        """Route this rank's tokens, x [T, W], and send each to the ranks of its experts.

        W is d_model, unless the gate reads ``router_input`` [T, d_model]: then x can have any width. ``meanwhile``
        is called while the host has yet to wait for the counts, to launch what can be computed until the tokens are
        there: with the ``spared`` and ``spared_flop`` of ``glu_up`` that leave this exchange room, and those of
        combine. On a stream of its own: the tokens leave when x's stream has done what was launched on it by then.
        """
        with aborting(self.comm):
            return _dispatch(self, x, gate_weight, router_input, expert_bias, valid_mask, meanwhile)

    def dispatch_backward(
        self, d_received, d_weights, dispatched, x, gate_weight, *,
        router_input=None, grad_losses=None, meanwhile=None,
    ):
        """``(dx, d_router_input, d_gate_weight, result)``; d_router_input may be None.

        ``finish = meanwhile()`` is called while d_received is on its way, and ``result = finish()`` when it is there.
        """
        with aborting(self.comm):
            return _dispatch_backward(
                self, d_received, d_weights, dispatched, x, gate_weight, router_input, grad_losses, meanwhile
            )

    # --- this rank's experts ---

    def run_experts(self, received, dispatched, w_up, w_down, *, save_for_backward=True):
        """``(rows [N, H], z)``: each received token's weighted sum over its experts on this rank."""
        with aborting(self.comm):
            return _run_experts(self, received, dispatched, w_up, w_down, save_for_backward)

    def run_experts_backward(self, d_rows, received, z, dispatched, w_up, w_down):
        """``(d_received [N, H], d_weights [N, S], weight_gradients)``.

        ``weight_gradients(w_up_grad=None, w_down_grad=None, scale=1.0)`` computes ``(dw_up, dw_down)``, times
        ``scale``: left to the caller, so that it can be done while d_received is on its way. It launches what is to
        run beside that, and returns a function that launches the rest and returns them. Arrays that it is given are
        added to, and None comes in their place, as in ``moe_backward``.
        """
        with aborting(self.comm):
            return _run_experts_backward(self, d_rows, received, z, dispatched, w_up, w_down)

    # --- combine ---

    def combine(self, rows, dispatched):
        """[T, W]: rows [N, W] back where their tokens came from, and summed by token.

        With losses of the group it also sums what they are made of over the ranks, and fills ``dispatched.losses`` and
        ``dispatched.balance``.
        """
        return self.finish_combine(self.start_combine(rows, dispatched), dispatched)

    def start_combine(self, rows, dispatched):
        """Sends rows [N, W] home."""
        with aborting(self.comm):
            return _start_combine(self, rows, dispatched)

    def finish_combine(self, combining, dispatched, *, added=None):
        """[T, W], as ``combine``, plus ``added`` [T, W] of the rows' dtype, such as a shared expert's output."""
        with aborting(self.comm):
            return _finish_combine(self, combining, dispatched, added)

    def combine_backward(self, grad_output, dispatched):
        """[N, W] from grad_output [T, W]."""
        return self.finish_combine_backward(self.start_combine_backward(grad_output, dispatched))

    def start_combine_backward(self, grad_output, dispatched):
        """Sends the gradients [T, W] to where the rows came from."""
        with aborting(self.comm):
            return _start_combine_backward(self, grad_output, dispatched)

    def finish_combine_backward(self, combining):
        """[N, W], as ``combine_backward``."""
        with aborting(self.comm):
            for transfer in combining.transfers:
                transfer.wait()
            return combining.rows


def _check_chunks(ep_chunks, num_experts, ep_size):
    if isinstance(ep_chunks, bool) or not isinstance(ep_chunks, int) or ep_chunks < 1:
        raise ConfigError(f"ep_chunks={ep_chunks!r} must be a whole number of at least 1")
    groups = max(ep_size, -(-num_experts // ep_size))
    if ep_chunks > 1 and ep_chunks * groups > MAX_EXPERTS:
        raise ConfigError(
            f"ep_chunks={ep_chunks} is too many for num_experts={num_experts} on {ep_size} ranks: at most "
            f"{MAX_EXPERTS // groups}"
        )


class aborting:
    """An error on this rank becomes one on the others, who would wait for it in vain."""

    def __init__(self, comm):
        self.comm = comm

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and not isinstance(error, CommError):
            self.comm.abort(f"{kind.__name__}: {error}")


def _check_agreement(comm, step, mine):
    """Every rank says how it is configured: what differs is a ConfigError on all of them."""
    all_said = [json.loads(text) for text in comm.gather(json.dumps(mine, default=str), step)]
    for name in dict.fromkeys(name for said in all_said for name in said):
        values = [said.get(name) for said in all_said]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
            where = f" for {step.layer}" if step.layer else ""
            raise ConfigError(f"the ranks do not agree on {name}{where} ({listed})")


# --- the plans ---

cdef class _Plans:
    """How large the three plans of a layer are. Layouts are those of packed_layout."""

    cdef object config
    cdef int64_t num_ranks, num_local
    cdef int num_chunks
    cdef int64_t most_ranks  # D: that a token can go to
    cdef int64_t num_slots  # S: that go with a token

    def __cinit__(self, config, int64_t num_ranks, int64_t num_local, int num_chunks):
        self.config = config
        self.num_ranks = num_ranks
        self.num_local = num_local
        self.num_chunks = num_chunks
        self.most_ranks = min(config.top_k, num_ranks)
        self.num_slots = min(config.top_k, -(-config.num_experts // num_ranks))

    cdef tuple routing_layout(self, int64_t num_tokens, int router):
        return packed_layout(num_tokens, self.config.top_k, self.config.num_experts, router)

    cdef tuple sending_layout(self, int64_t num_tokens, int router):
        return packed_layout(num_tokens, self.most_ranks, self.num_ranks * self.num_chunks, router)

    cdef tuple receiving_layout(self, int64_t num_received, int router):
        return packed_layout(num_received, self.num_slots, self.num_local * self.num_chunks, router)

    # the plans of an earlier `dispatch`

    cdef RoutingParts routing(self, dispatched, int router):
        layout = self.routing_layout(dispatched.sizes.tokens, router)
        return parts_of(dispatched.routing, "dispatched.routing", layout)

    cdef RoutingParts sending(self, dispatched, int router):
        layout = self.sending_layout(dispatched.sizes.tokens, router)
        return parts_of(dispatched.sending, "dispatched.sending", layout)

    cdef RoutingParts receiving(self, dispatched, int router):
        layout = self.receiving_layout(sum(dispatched.sizes.received), router)
        return parts_of(dispatched.receiving, "dispatched.receiving", layout)


cdef RoutingParts parts_of(object block, str name, tuple layout):
    cdef Array array = view(block, name)
    check_shape(array, name, "[RoutingLayout.nbytes]", layout[0])
    check_dtype(array, name, (<int>UINT8,))
    return RoutingParts(array, layout[1])


cdef Array first(Array array, int64_t count):
    """The first elements of an array; a plan's rows have room for every slot."""
    return array.at(0, (count,), array.dtype)


cdef Array balance_from(dispatched, int64_t num_experts):
    """The group's, of an earlier ``dispatch``."""
    cdef Array balance = view(dispatched.balance, "dispatched.balance")
    check_shape(balance, "dispatched.balance", "[2 * num_experts + 1]", 2 * num_experts + 1)
    check_dtype(balance, "dispatched.balance", (<int>INT32,))
    return balance


cdef Array tokens_per_expert_of(Array balance, int64_t num_experts):
    return balance.at(4 * (num_experts + 1), (num_experts,), INT32)


cdef Array sums_part(Array sums, int whose, int64_t num_experts):
    """float64 [E + 2] that losses are made of: this rank's (0), or the group's (1)."""
    return sums.at(8 * whose * (num_experts + 2), (num_experts + 2,), FLOAT64)


cdef Array balance_of(Array routing_block, int64_t num_experts):
    """int32 [2E + 1]: expert_offsets and tokens_per_expert, which stand together at the end of the block."""
    cdef int64_t size = 2 * num_experts + 1
    return routing_block.at(routing_block.nbytes - 4 * size, (size,), INT32)


# --- dispatch ---

def _dispatch(layer, x, gate_weight, router_input, expert_bias, valid_mask, meanwhile):
    config, comm = layer.config, layer.comm
    cdef Array tokens = view(x, "x"), gate = view(gate_weight, "gate_weight"), routed = tokens
    check_shape(tokens, "x", "[T, width]", -1, -1)
    check_floating(tokens, "x")
    cdef int64_t T = tokens.dims[0], width = tokens.dims[1], E = config.num_experts, K = config.top_k
    cdef int W = router_dtype(tokens)
    check_rows(T, K)
    cdef _Plans plans = layer._plans
    cdef int64_t P = plans.num_ranks, D = plans.most_ranks, S = plans.num_slots
    cdef int C = plans.num_chunks
    check_rows(T * D, S)
    if router_input is not None:
        routed = view(router_input, "router_input")
        check_shape(routed, "router_input", "[T, d_model]", T, config.d_model)
        check_like(routed, "router_input", tokens, "x")
    else:
        check_shape(tokens, "x", "[T, d_model]", T, config.d_model)
    check_gate(gate, config, tokens)
    layer.agree_on_rows(tokens.dtype_name, tokens.dims[1])
    cdef Array bias = bias_of(expert_bias, E, tokens), mask = mask_of(valid_mask, T, tokens)
    cdef Space space = space_of(x, tokens)
    backend = backend_for(space)
    cdef bint group = layer.loss_scope == "group"

    # who goes to which expert
    cdef Array logits = space.empty((T, E), W)
    backend.gate_logits(space, routed, gate, logits)
    check_finite(space, logits)
    layout, sending_layout = plans.routing_layout(T, W), plans.sending_layout(T, W)
    cdef Array routing_block = space.empty((layout[0],), UINT8)
    cdef Array sending_block = space.empty((sending_layout[0],), UINT8)
    cdef RoutingParts plan = RoutingParts(routing_block, layout[1])
    cdef RoutingParts sending = RoutingParts(sending_block, sending_layout[1])
    cdef Array losses = space.empty((3,), W)
    cdef Array sums = space.empty((2, E + 2), FLOAT64) if group else None
    cdef Array own_sums = sums_part(sums, 0, E) if group else None
    capacity = config.capacity(T)
    backend.route_and_sort(
        space, config, logits, bias, mask, -1 if capacity is None else capacity,
        plan.topk_idx, plan.topk_weights, plan.tokens_per_expert, losses, own_sums,
        plan.expert_offsets, plan.row_token, plan.row_weights, plan.token_rows,
    )
    if capacity is not None and not config.allow_dropped_tokens:
        check_capacity(space, plan.tokens_per_expert, capacity)

    # and so to which rank; a sort wants weights, but nothing reads these
    cdef Array any_weights = plan.topk_weights
    backend.dispatch_ranks(space, plan.topk_idx, plan.token_rows, E, P, sending.topk_idx, C)
    backend.sort(
        space, sending.topk_idx, any_weights.at(0, (T, D), W), -1, "position",
        sending.expert_offsets, sending.row_token, sending.row_weights, sending.token_rows,
    )
    cdef Array slot_experts = space.empty((T * D, S), INT32)
    cdef Array slot_weights = space.empty((T * D, S), W)
    cdef Array pair_slots = space.empty((T, K), INT32)
    # rows by chunk, and pairs: to each rank, from each rank
    cdef Array counts = space.empty((2, P, C + 1), INT32)
    cdef Array counts_out = counts.at(0, (P, C + 1), INT32)
    cdef Array counts_in = counts.at(4 * P * (C + 1), (P, C + 1), INT32)
    backend.dispatch_slots(
        space, plan.topk_idx, plan.topk_weights, plan.token_rows, plan.expert_offsets, sending.topk_idx,
        sending.token_rows, sending.expert_offsets, slot_experts, slot_weights, pair_slots, counts_out, C,
    )
    step = layer._steps["counts"]
    counting = comm.all_to_all(space, counts_out, counts_in, step)
    # while they cross, and the host is at them, all is done that does not depend on them
    cdef Array packed = space.empty((T * D, width), tokens.dtype)
    backend.permute(space, tokens, sending.row_token, sending.expert_offsets, packed)
    reading = comm.read(space, counts, step)
    if meanwhile is not None:
        # of the rows that leave nobody knows more yet than how many they are at most
        row_bytes = width * itemsize(tokens.dtype)
        meanwhile(comm.multiprocessors, FLOPS_A_BYTE * T * min(K, P - 1) * row_bytes)
    cdef Array balance = space.empty((2 * E + 1,), INT32) if group else None
    kept = [
        None if part is None else space.export(part)
        for part in (losses, logits, routing_block, balance, sums, sending_block, pair_slots)
    ]
    step = layer._steps["dispatch"]
    counting.wait()
    sizes = sizes_of(T, reading(), C)

    # the tokens cross
    cdef int64_t N = sum(sizes.received)
    check_rows(N, S)
    layout = plans.receiving_layout(N, W)
    cdef Array receiving_block = space.empty((layout[0],), UINT8)
    cdef RoutingParts receiving = RoutingParts(receiving_block, layout[1])
    cdef Array received = space.empty((N, width), tokens.dtype)
    cdef Array weights = space.empty((N, S), W)
    slots = [(slot_experts, receiving.topk_idx), (slot_weights, weights)]
    underway = None
    if C == 1:
        parts = [(packed, received), *slots]
        transfer = comm.all_to_all_v(space, parts, sizes.sent, sizes.received, step)
    else:
        transfer = comm.all_to_all_v(space, slots, sizes.sent, sizes.received, step)
        underway = Underway()
        underway.arriving = [
            exchange_chunk(comm, space, [(packed, received)], sizes.sent, sizes.received, chunk, step)
            for chunk in range(C)
        ]
    transfer.wait()
    backend.sort(
        space, receiving.topk_idx, weights, -1, "position",
        receiving.expert_offsets, receiving.row_token, receiving.row_weights, receiving.token_rows,
    )
    return Dispatched(
        space.export(received), space.export(weights), *kept, space.export(receiving_block), sizes, underway
    )


cdef object sizes_of(int64_t num_tokens, counts, int num_chunks):
    """Sizes from the counts [to and from each rank, P, chunks and pairs]."""
    to_ranks, from_ranks = counts.tolist()
    chunks = range(num_chunks)
    return Sizes(
        num_tokens,
        tuple([rank[chunk] for chunk in chunks for rank in to_ranks]),
        tuple([rank[chunk] for chunk in chunks for rank in from_ranks]),
        sum([rank[num_chunks] for rank in from_ranks]),
    )


def exchange_chunk(comm, space, parts, sent, received, chunk, step):
    """Start to exchange one chunk's rows of (send, recv) Arrays that have all chunks'."""
    ranks = slice(chunk * comm.size, (chunk + 1) * comm.size)
    return comm.all_to_all_v(
        space,
        [(chunk_of(send, sent, chunk, comm.size), chunk_of(recv, received, chunk, comm.size)) for send, recv in parts],
        sent[ranks],
        received[ranks],
        step,
    )


cdef Array chunk_of(Array array, tuple counts, int chunk, int num_ranks):
    """The rows of one chunk, of an Array that has the rows of ``counts``, a number for each chunk and rank."""
    cdef int first = chunk * num_ranks
    if len(counts) == num_ranks:
        return array
    cdef int64_t before = sum(counts[:first]), rows = sum(counts[first : first + num_ranks])
    cdef int64_t row_bytes = array.nbytes // max(array.dims[0], 1)
    return array.at(before * row_bytes, (rows, *array.shape[1:]), array.dtype)


def _dispatch_backward(
    layer, d_received, d_weights, dispatched, x, gate_weight, router_input, grad_losses, meanwhile
):
    config, comm = layer.config, layer.comm
    cdef Array d_tokens = view(d_received, "d_received"), d_slots = view(d_weights, "d_weights")
    cdef Array tokens = view(x, "x"), gate = view(gate_weight, "gate_weight"), routed = tokens
    check_shape(tokens, "x", "[T, width]", -1, -1)
    check_floating(tokens, "x")
    cdef int64_t T = tokens.dims[0], width = tokens.dims[1], E = config.num_experts, H = config.d_model
    cdef int W = router_dtype(tokens), K = config.top_k
    cdef _Plans plans = layer._plans
    cdef RoutingParts plan = plans.routing(dispatched, W), sending = plans.sending(dispatched, W)
    cdef int64_t S = plans.num_slots, N = sum(dispatched.sizes.received)
    check_shape(d_tokens, "d_received", "[N, width]", N, width)
    check_like(d_tokens, "d_received", tokens, "x")
    check_shape(d_slots, "d_weights", "[N, slots]", N, S)
    check_dtype(d_slots, "d_weights", (W,))
    check_device(d_slots, "d_weights", tokens, "x")
    if router_input is not None:
        routed = view(router_input, "router_input")
        check_shape(routed, "router_input", "[T, d_model]", T, H)
        check_like(routed, "router_input", tokens, "x")
    else:
        check_shape(tokens, "x", "[T, d_model]", T, H)
    check_gate(gate, config, tokens)
    cdef Array logits = view(dispatched.logits, "dispatched.logits")
    check_shape(logits, "dispatched.logits", "[T, num_experts]", T, E)
    check_dtype(logits, "dispatched.logits", (W,))
    cdef Array pair_slots = view(dispatched.pair_slots, "dispatched.pair_slots")
    check_shape(pair_slots, "dispatched.pair_slots", "[T, top_k]", T, K)
    check_dtype(pair_slots, "dispatched.pair_slots", (<int>INT32,))
    cdef Array d_losses = None
    if grad_losses is not None:
        d_losses = view(grad_losses, "grad_losses")
        check_shape(d_losses, "grad_losses", "[3]", 3)
        check_device(d_losses, "grad_losses", tokens, "x")
        check_dtype(d_losses, "grad_losses", (W,))
    elif layer.loss_scope == "group" and layer.has_losses:
        raise ConfigError(
            "grad_losses=None: losses of the whole group need every rank's gradient of them; pass zeros where "
            "there is none"
        )
    cdef Space space = space_of(x, tokens)
    backend = backend_for(space)

    # the weights' gradients cross first: the router's, made of these, are computed while the tokens' cross
    cdef Array d_pairs, returned
    underway = dispatched.underway
    if underway is not None and underway.weighing is not None:
        (d_pairs, weighing), underway.weighing = underway.weighing, None
    else:
        d_pairs, weighing = weights_home(layer, space, dispatched, d_slots)
    cdef Array tokens_per_expert = plan.tokens_per_expert, own_d_losses
    cdef bint group = layer.loss_scope == "group" and layer.has_losses
    if group:
        own_d_losses = d_losses
        d_losses = space.empty((3,), W)  # of the sum of all ranks' objectives, each of which holds the losses
        summing = comm.all_reduce(space, [(own_d_losses, d_losses)], layer._steps["losses backward"])
        tokens_per_expert = tokens_per_expert_of(balance_from(dispatched, E), E)
    (returned,), transfers = landing_of(
        layer, space, dispatched, [d_tokens], layer._steps["dispatch backward"]
    )
    finish = None if meanwhile is None else meanwhile()
    weighing.wait()
    if group:
        summing.wait()
    cdef Array chosen = plan.topk_idx if config.sparse_gradient else None
    cdef Array d_logits = space.empty((T, E if chosen is None else K), W)
    backend.route_backward(
        space, config, logits, plan.topk_idx, plan.topk_weights, tokens_per_expert,
        pair_slots, first(d_pairs, d_pairs.size), d_losses, d_logits,
    )
    cdef Array d_gate = space.empty((E, H), gate.dtype)
    cdef Array dx = space.empty((T, width), tokens.dtype), d_router = None
    token_rows = sending.token_rows
    if router_input is None:
        backend.gate_backward(space, d_logits, tokens, gate, None, None, None, d_gate, chosen)
        for transfer in transfers:
            transfer.wait()
        backend.gate_backward(space, d_logits, tokens, gate, returned, token_rows, dx, None, chosen)
    else:
        d_router = space.empty((T, H), tokens.dtype)
        backend.gate_backward(space, d_logits, routed, gate, None, None, d_router, d_gate, chosen)
        for transfer in transfers:
            transfer.wait()
        backend.combine(space, returned, token_rows, None, dx)
    return (
        space.export(dx),
        None if d_router is None else space.export(d_router),
        space.export(d_gate),
        None if finish is None else finish(),
    )


def landing_for(space, dispatched, array):
    """Where rows [num_received, n] land that go home: an Array [num_sent, n]."""
    return space.empty((sum(dispatched.sizes.sent), *array.shape[1:]), array.dtype)


def weights_home(layer, space, dispatched, d_slots):
    """(Array [num_sent, slots], Transfer): the weights' gradients on their way home, those of all chunks."""
    landing, sizes = landing_for(space, dispatched, d_slots), dispatched.sizes
    return landing, layer.comm.all_to_all_v(
        space, [(d_slots, landing)], sizes.received, sizes.sent, layer._steps["weights backward"]
    )


def landing_of(layer, space, dispatched, arrays, step):
    """(Arrays [num_sent, n], Transfers): where received rows land that go home, and what is to be waited for.

    They are on their way since ``run_experts`` or its gradient, or start now.
    """
    cdef Array own = arrays[0], sent
    underway, sizes = dispatched.underway, dispatched.sizes
    if underway is not None and underway.arriving:
        raise ConfigError(
            f"ep_chunks={layer.ep_chunks}: rows are still on their way to the experts, which wait for them, so that "
            f"{step.name} comes after run_experts or its gradient"
        )
    if underway is not None and underway.returning:
        sent, landing, transfers = underway.rows, underway.landing, underway.returning
        underway.rows, underway.landing, underway.returning = None, (), ()
        if sent.data != own.data:
            raise ConfigError(
                f"ep_chunks={layer.ep_chunks}: rows are on their way home when the experts are done, so that "
                f"{step.name} takes what they returned and nothing else"
            )
        return landing, transfers
    landing = [landing_for(space, dispatched, array) for array in arrays]
    parts = list(zip(arrays, landing, strict=True))
    return landing, [
        exchange_chunk(layer.comm, space, parts, sizes.received, sizes.sent, chunk, step)
        for chunk in range(layer.ep_chunks)
    ]


cdef int check_gate(Array gate, config, Array tokens) except -1:
    check_shape(gate, "gate_weight", "[num_experts, d_model]", config.num_experts, config.d_model)
    check_device(gate, "gate_weight", tokens, "x")
    check_dtype(gate, "gate_weight", (tokens.dtype, router_dtype(tokens)))
    return 0


# --- this rank's experts ---

cdef int check_experts(layer, Array received, Array up, Array down, dispatched) except -1:
    config = layer.config
    cdef int64_t L = len(layer.experts), H = config.d_model, I = config.ffn_dim // 2
    check_shape(received, "received", "[N, d_model]", sum(dispatched.sizes.received), H)
    check_shape(up, "w_up", "[experts of this rank, ffn_dim, d_model]", L, 2 * I, H)
    check_like(up, "w_up", received, "received")
    check_shape(down, "w_down", "[experts of this rank, d_model, ffn_dim // 2]", L, H, I)
    check_like(down, "w_down", received, "received")
    return 0


def _run_experts(layer, received, dispatched, w_up, w_down, save_for_backward):
    config = layer.config
    cdef Array tokens = view(received, "received"), up = view(w_up, "w_up"), down = view(w_down, "w_down")
    check_floating(tokens, "received")
    check_experts(layer, tokens, up, down, dispatched)
    cdef _Plans plans = layer._plans
    cdef RoutingParts receiving = plans.receiving(dispatched, router_dtype(tokens))
    cdef Array weights = view(dispatched.weights, "dispatched.weights")
    cdef Space space = space_of(received, tokens)
    backend = backend_for(space)
    cdef int64_t R = dispatched.sizes.rows, I = config.ffn_dim // 2, H = config.d_model
    cdef Array z = None
    if save_for_backward and not config.recompute_activations:
        z = space.empty((R, 2 * I), tokens.dtype)
    cdef Array a = space.empty((R, I), tokens.dtype)
    cdef Array y = space.empty((R, H), tokens.dtype)
    cdef Array rows = space.empty((tokens.dims[0], H), tokens.dtype)
    cdef Array offsets = receiving.expert_offsets, row_token = first(receiving.row_token, R)
    home = Homeward(layer, space, dispatched, [rows], "combine")
    cdef int C = plans.num_chunks, chunk
    cdef int64_t L = len(layer.experts), begin, end
    cdef double a_weight = 2.0 * R / C * I * H / L  # FLOP of an expert's product with one of its three matrices
    cdef Beside beside
    for chunk in range(C):
        home.wait_for(chunk)
        beside = Beside(layer, space, home.crossing(chunk))
        for begin, end in beside.parts(L, 2 * a_weight):
            backend.grouped_glu(
                space, tokens, experts_of(up, begin, end), offsets_of(offsets, begin, end, C), row_token,
                config.activation, z, a, C, chunk,
            )
        for begin, end in beside.parts(L, a_weight):
            backend.grouped_gemm(
                space, a, experts_of(down, begin, end), offsets_of(offsets, begin, end, C), None, True, y, C, chunk
            )
        backend.combine(space, y, *[home.part(array, chunk) for array in (receiving.token_rows, weights, rows)])
        home.start(chunk)
    return space.export(rows), None if z is None else space.export(z)


cdef class Homeward:
    """The chunks at the experts: each is waited for, and with chunks sent home when it is done."""

    cdef object comm, space, underway, sizes, arriving, parts, step
    cdef int64_t row_bytes

    def __cinit__(self, layer, space, dispatched, arrays, name):
        self.comm = layer.comm
        self.space = space
        self.sizes = dispatched.sizes
        self.underway = dispatched.underway
        self.step = layer._steps[name]
        cdef Array rows = arrays[0]
        self.row_bytes = rows.dims[1] * itemsize(rows.dtype)
        if self.underway is not None:
            self.arriving = self.underway.take_arriving()
            self.underway.rows = arrays[0]
            self.underway.landing = [landing_for(space, dispatched, array) for array in arrays]
            self.underway.returning = []
            self.parts = list(zip(arrays, self.underway.landing, strict=True))

    cdef int wait_for(self, int chunk) except -1:
        if self.underway is not None and self.arriving:
            self.arriving[chunk].wait()
        return 0

    cdef int64_t crossing(self, int chunk):
        """Bytes that cross to or from other ranks while a chunk is at the experts; "chunk" C is what comes after all.

        All chunks but the first are on their way here when that is there, and one goes home when the next is there.
        """
        cdef int C = len(self.sizes.received) // self.comm.size
        return (C - 1 if chunk == 0 else 1) * (crossing_rows(self.comm, self.sizes) * self.row_bytes // C)

    cdef Array part(self, Array array, int chunk):
        """The chunk's rows of an Array of all received tokens."""
        return chunk_of(array, self.sizes.received, chunk, self.comm.size)

    cdef int start(self, int chunk) except -1:
        if self.underway is not None:
            self.underway.returning.append(
                exchange_chunk(
                    self.comm, self.space, self.parts, self.sizes.received, self.sizes.sent, chunk, self.step
                )
            )
        return 0


def _run_experts_backward(layer, d_rows, received, kept_z, dispatched, w_up, w_down):
    config = layer.config
    cdef Array tokens = view(received, "received"), up = view(w_up, "w_up"), down = view(w_down, "w_down")
    cdef Array d_out = view(d_rows, "d_rows"), z
    check_floating(tokens, "received")
    cdef int W = router_dtype(tokens)
    check_experts(layer, tokens, up, down, dispatched)
    cdef _Plans plans = layer._plans
    cdef RoutingParts receiving = plans.receiving(dispatched, W)
    cdef int64_t R = dispatched.sizes.rows, N = tokens.dims[0], L = plans.num_local, S = plans.num_slots
    cdef int64_t I = config.ffn_dim // 2, H = config.d_model
    check_shape(d_out, "d_rows", "[N, d_model]", N, H)
    check_like(d_out, "d_rows", tokens, "received")
    cdef Space space = space_of(received, tokens)
    backend = backend_for(space)
    cdef Array offsets = receiving.expert_offsets, row_token = first(receiving.row_token, R)
    cdef Array row_weights = first(receiving.row_weights, R)
    cdef Array pa = space.empty((R, I), tokens.dtype)
    if kept_z is not None:
        z = view(kept_z, "z")
        check_shape(z, "z", "[rows, ffn_dim]", R, 2 * I)
        check_like(z, "z", tokens, "received")
    else:
        z = space.empty((R, 2 * I), tokens.dtype)
    cdef Array dz = space.empty((R, 2 * I), tokens.dtype)
    cdef Array dx_rows = space.empty((R, H), tokens.dtype)
    cdef Array d_tokens = space.empty((N, H), tokens.dtype), d_slots = space.empty((N, S), W)
    cdef Array dp, rows_of_slots, d_slots_part
    home = Homeward(layer, space, dispatched, [d_tokens], "dispatch backward")
    cdef int C = plans.num_chunks, chunk
    cdef int64_t begin, end
    cdef double a_weight = 2.0 * R / C * I * H / L
    cdef Beside beside
    for chunk in range(C):
        beside = Beside(layer, space, home.crossing(chunk))
        if kept_z is None:
            # pa takes the recomputed activations only to be overwritten by the next stage
            for begin, end in beside.parts(L, 2 * a_weight):
                backend.grouped_glu(
                    space, tokens, experts_of(up, begin, end), offsets_of(offsets, begin, end, C), row_token,
                    config.activation, z, pa, C, chunk,
                )
        home.wait_for(chunk)
        dp = space.empty((R, 1), W)  # only this chunk's rows are of use
        # In one: it writes dp of all rows, of other experts' too.
        space.spared = beside.spared(L, a_weight)
        backend.grouped_glu_backward(
            space, d_out, down, offsets, row_token, row_weights, z, config.activation, dz, pa,
            dp.at(0, (R,), W), C, chunk,
        )
        space.spared = 0
        for begin, end in beside.parts(L, 2 * a_weight):
            backend.grouped_gemm(
                space, dz, experts_of(up, begin, end), offsets_of(offsets, begin, end, C), None, False, dx_rows,
                C, chunk,
            )
        rows_of_slots = home.part(receiving.token_rows, chunk)
        backend.combine(space, dx_rows, rows_of_slots, None, home.part(d_tokens, chunk))
        # a slot's gradient is its row's: a sum of one
        d_slots_part = home.part(d_slots, chunk)
        backend.combine(
            space, dp, rows_of_slots.at(0, (rows_of_slots.size, 1), INT32), None,
            d_slots_part.at(0, (rows_of_slots.size, 1), W),
        )
        if chunk == C - 1 and dispatched.underway is not None:
            dispatched.underway.weighing = weights_home(layer, space, dispatched, d_slots)
        home.start(chunk)
    z = dx_rows = None
    cdef int64_t crossing_last = home.crossing(C)

    def weight_gradients(w_up_grad=None, w_down_grad=None, scale=1.0):
        cdef Array dw_up = sums_of(w_up_grad, "w_up_grad", "[experts of this rank, ffn_dim, d_model]", up)
        cdef Array dw_down = sums_of(
            w_down_grad, "w_down_grad", "[experts of this rank, d_model, ffn_dim // 2]", down
        )
        if w_down_grad is None:
            dw_down = space.empty((L, H, I), tokens.dtype)
        if w_up_grad is None:
            dw_up = space.empty((L, 2 * I, H), tokens.dtype)

        def run(int64_t down_begin, int64_t down_end, int64_t up_begin, int64_t up_end):
            """Those of the experts from one to another, by w_down and by w_up."""
            if down_begin < down_end:
                backend.grouped_gemm_wgrad(
                    space, d_out, pa, offsets_of(offsets, down_begin, down_end, C), row_token, None,
                    experts_of(dw_down, down_begin, down_end), w_down_grad is not None, scale, C,
                )
            if up_begin < up_end:
                backend.grouped_gemm_wgrad(
                    space, dz, tokens, offsets_of(offsets, up_begin, up_end, C), None, row_token,
                    experts_of(dw_up, up_begin, up_end), w_up_grad is not None, scale, C,
                )

        cdef Beside beside = Beside(layer, space, crossing_last)
        cdef int64_t downs = beside.experts(L, C * a_weight), ups = beside.experts(L, 2 * C * a_weight)
        space.spared = layer.comm.multiprocessors
        run(0, downs, 0, ups)
        space.spared = 0

        def finish():
            run(downs, L, ups, L)
            return (
                space.export(dw_up) if w_up_grad is None else None,
                space.export(dw_down) if w_down_grad is None else None,
            )

        return finish

    return space.export(d_tokens), space.export(d_slots), weight_gradients


cdef Array experts_of(Array weights, int64_t begin, int64_t end):
    """The experts from one to another, of an Array of all."""
    cdef int64_t nbytes = weights.nbytes // weights.dims[0]
    return weights.at(begin * nbytes, (end - begin, weights.dims[1], weights.dims[2]), weights.dtype)


cdef Array offsets_of(Array offsets, int64_t begin, int64_t end, int chunks):
    """Their part of expert_offsets, in which each has so many chunks."""
    return offsets.at(4 * begin * chunks, ((end - begin) * chunks + 1,), INT32)


cdef class Beside:
    """How many experts' products are launched beside an exchange: as many as it takes, all where it keeps no
    multiprocessors busy.
    """

    cdef Space space
    cdef int multiprocessors
    cdef double flop  # that is multiplied until ``nbytes`` have crossed, and was not given to products yet

    def __cinit__(self, layer, Space space, int64_t nbytes):
        self.space = space
        self.multiprocessors = layer.comm.multiprocessors
        self.flop = FLOPS_A_BYTE * nbytes

    cdef int64_t experts(self, int64_t num_experts, double flop_an_expert):
        if self.multiprocessors == 0:
            return num_experts
        cdef int64_t count = min(<int64_t>ceil(self.flop / max(flop_an_expert, 1.0)), num_experts)
        self.flop = max(self.flop - count * flop_an_expert, 0.0)
        return count

    cdef int spared(self, int64_t num_experts, double flop_an_expert):
        """How many multiprocessors a product of all experts leaves free."""
        return self.multiprocessors if self.experts(num_experts, flop_an_expert) > 0 else 0

    def parts(self, int64_t num_experts, double flop_an_expert):
        """(first, end) of those whose products spare multiprocessors, and of the others, for each to be launched."""
        cdef int64_t count = self.experts(num_experts, flop_an_expert)
        if count > 0:
            self.space.spared = self.multiprocessors
            yield 0, count
            self.space.spared = 0
        if count < num_experts:
            yield count, num_experts


cdef int64_t others_rows(tuple counts, comm):
    """Of rows by chunk and rank, those that are not this rank's own."""
    return sum(counts) - sum(counts[comm.rank :: comm.size])


cdef int64_t crossing_rows(comm, sizes):
    """Of all chunks, one way or the other, whichever are more."""
    return max(others_rows(sizes.sent, comm), others_rows(sizes.received, comm))


# --- combine ---

def _start_combine(layer, rows, dispatched):
    cdef Array source = view(rows, "rows")
    check_shape(source, "rows", "[N, width]", -1, -1)
    check_floating(source, "rows")
    sizes = dispatched.sizes
    check_shape(source, "rows", "[N, width]", sum(sizes.received), -1)
    cdef Space space = space_of(rows, source)
    (returned,), transfers = landing_of(layer, space, dispatched, [source], layer._steps["combine"])
    return Combining(space.export(returned), rows, transfers)


def _finish_combine(layer, combining, dispatched, added):
    cdef Array returned = view(combining.packed, "combining.packed")
    sizes = dispatched.sizes
    check_shape(returned, "combining.packed", "[num_sent, width]", sum(sizes.sent), -1)
    cdef _Plans plans = layer._plans
    cdef RoutingParts sending = plans.sending(dispatched, router_dtype(returned))
    cdef Array own = None
    if added is not None:
        own = view(added, "added")
        check_shape(own, "added", "[T, width]", sizes.tokens, returned.dims[1])
        check_like(own, "added", returned, "combining.packed")
    cdef Space space = space_of(combining.packed, returned)
    backend = backend_for(space)
    # The group's losses come last, as nothing waits for them: their sums cross while the tokens are summed.
    cdef Array sums = None, balance, routing
    cdef int64_t E = layer.config.num_experts
    if layer.loss_scope == "group":
        sums = view(dispatched.sums, "dispatched.sums")
        check_shape(sums, "dispatched.sums", "[2, num_experts + 2]", 2, E + 2)
        check_dtype(sums, "dispatched.sums", (<int>FLOAT64,))
        routing, balance = view(dispatched.routing, "dispatched.routing"), balance_from(dispatched, E)
        summing = layer.comm.all_reduce(
            space,
            [(balance_of(routing, E), balance), (sums_part(sums, 0, E), sums_part(sums, 1, E))],
            layer._steps["losses"],
        )
    for transfer in combining.transfers:
        transfer.wait()
    cdef Array output = space.empty((sizes.tokens, returned.dims[1]), returned.dtype)
    backend.combine(space, returned, sending.token_rows, None, output, own)
    if sums is not None:
        summing.wait()
        backend.router_losses(
            space, layer.config, sums_part(sums, 1, E), tokens_per_expert_of(balance, E),
            view(dispatched.losses, "dispatched.losses"),
        )
    return space.export(output)


def _start_combine_backward(layer, grad_output, dispatched):
    cdef Array d_out = view(grad_output, "grad_output")
    step, sizes = layer._steps["combine backward"], dispatched.sizes
    check_shape(d_out, "grad_output", "[T, width]", sizes.tokens, -1)
    check_floating(d_out, "grad_output")
    cdef int64_t width = d_out.dims[1]
    cdef _Plans plans = layer._plans
    cdef RoutingParts sending = plans.sending(dispatched, router_dtype(d_out))
    cdef Space space = space_of(grad_output, d_out)
    cdef Array packed = space.empty((sum(sizes.sent), width), d_out.dtype)
    backend_for(space).permute(space, d_out, sending.row_token, sending.expert_offsets, packed)
    cdef Array d_rows = space.empty((sum(sizes.received), width), d_out.dtype)
    transfers = [
        exchange_chunk(layer.comm, space, [(packed, d_rows)], sizes.sent, sizes.received, chunk, step)
        for chunk in range(layer.ep_chunks)
    ]
    if dispatched.underway is not None:
        dispatched.underway.arriving, transfers = transfers, ()  # the experts wait for each
    return Combining(space.export(packed), space.export(d_rows), transfers)
