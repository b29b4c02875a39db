"""What crosses between the ranks of a layer whose experts are spread over them: from where, and where it lands.

Three plans say who goes where, all of them made by the same stable sort:
    routing    a token's pairs, to the experts of the whole group; here tokens are dropped, too
    sending    a token, once to each rank that holds any of its experts
    receiving  the pairs of the tokens that came, to the experts of this rank
A token crosses with its slots: for each of its experts on that rank the number there, and the weight. One row goes
back for each that came. Backward goes the same ways: what was gathered is summed and vice versa.

What is exchanged, and in which order, is the same on every rank, whatever its number of tokens.

With chunks, packed and received rows stand chunk by chunk. What goes with the tokens crosses ahead of all of them, and
so the receiving plan is of all chunks at once.
"""

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
from .moe cimport RoutingParts

from .backend import backend_for
from .ep_types import Combining, Dispatched, Sizes, Underway
from .errors import ConfigError
from .moe import check_capacity, packed_layout

# What a GPU multiplies in 16 bits while a byte crosses to another, in FLOP: 500 TFLOP/s and 250 GB/s (H200, NVLink).
FLOPS_A_BYTE = 2000.0


# --- the plans ---

cdef class Plans:
    """How large the three plans of a layer are. Layouts are those of packed_layout."""

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

def dispatch(layer, x, gate_weight, router_input, expert_bias, valid_mask, meanwhile):
    config, comm = layer.config, layer.comm
    cdef Array tokens = view(x, "x"), gate = view(gate_weight, "gate_weight"), routed = tokens
    check_shape(tokens, "x", "[T, width]", -1, -1)
    check_floating(tokens, "x")
    cdef int64_t T = tokens.dims[0], width = tokens.dims[1], E = config.num_experts, K = config.top_k
    cdef int W = router_dtype(tokens)
    check_rows(T, K)
    cdef Plans plans = layer._plans
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
        meanwhile(comm.multiprocessors, flop_beside(T * min(K, P - 1) * width * itemsize(tokens.dtype)))
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


def dispatch_backward(
    layer, d_received, d_weights, dispatched, x, gate_weight, router_input, grad_losses, meanwhile
):
    config, comm = layer.config, layer.comm
    cdef Array d_tokens = view(d_received, "d_received"), d_slots = view(d_weights, "d_weights")
    cdef Array tokens = view(x, "x"), gate = view(gate_weight, "gate_weight"), routed = tokens
    check_shape(tokens, "x", "[T, width]", -1, -1)
    check_floating(tokens, "x")
    cdef int64_t T = tokens.dims[0], width = tokens.dims[1], E = config.num_experts, H = config.d_model
    cdef int W = router_dtype(tokens), K = config.top_k
    cdef Plans plans = layer._plans
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


cdef int check_gate(Array gate, config, Array tokens) except -1:
    check_shape(gate, "gate_weight", "[num_experts, d_model]", config.num_experts, config.d_model)
    check_device(gate, "gate_weight", tokens, "x")
    check_dtype(gate, "gate_weight", (tokens.dtype, router_dtype(tokens)))
    return 0


# --- combine ---

def start_combine(layer, rows, dispatched):
    cdef Array source = view(rows, "rows")
    check_shape(source, "rows", "[N, width]", -1, -1)
    check_floating(source, "rows")
    sizes = dispatched.sizes
    check_shape(source, "rows", "[N, width]", sum(sizes.received), -1)
    cdef Space space = space_of(rows, source)
    (returned,), transfers = landing_of(layer, space, dispatched, [source], layer._steps["combine"])
    return Combining(space.export(returned), rows, transfers)


def finish_combine(layer, combining, dispatched, added):
    cdef Array returned = view(combining.packed, "combining.packed")
    sizes = dispatched.sizes
    check_shape(returned, "combining.packed", "[num_sent, width]", sum(sizes.sent), -1)
    cdef Plans plans = layer._plans
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


def start_combine_backward(layer, grad_output, dispatched):
    cdef Array d_out = view(grad_output, "grad_output")
    step, sizes = layer._steps["combine backward"], dispatched.sizes
    check_shape(d_out, "grad_output", "[T, width]", sizes.tokens, -1)
    check_floating(d_out, "grad_output")
    cdef int64_t width = d_out.dims[1]
    cdef Plans plans = layer._plans
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


# --- what both are made of ---

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


cdef double flop_beside(int64_t nbytes) except -1:
    """FLOP that a GPU multiplies while as many bytes cross to others."""
    return FLOPS_A_BYTE * nbytes
