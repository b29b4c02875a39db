"""The products of this rank's experts, and how they share the GPU with exchanges.

They read the received tokens in place, and their rows are summed here in the order of the slots: one row goes home for
each token that came.

On a GPU an exchange keeps multiprocessors busy (``Communicator.multiprocessors``). A product takes all of them, and
stays until it is done: an exchange that comes later would begin when it ends. So as many experts' products as an
exchange takes leave them free (``Space.spared``), and the others come after them.

With chunks an expert's rows are still one run in the receiving plan, cut into chunks. The products of rows take a chunk
of each expert, the weight gradients all.
"""

from libc.math cimport ceil
from libc.stdint cimport int64_t

from .arrays cimport INT32, Array, Space, itemsize, space_of, view
from .checks cimport check_floating, check_like, check_shape, router_dtype
from .ep_exchange cimport Plans, chunk_of, first, flop_beside
from .moe cimport RoutingParts, sums_of

from .backend import backend_for
from .ep_exchange import exchange_chunk, landing_for, weights_home


def run_experts(layer, received, dispatched, w_up, w_down, save_for_backward):
    config = layer.config
    cdef Array tokens = view(received, "received"), up = view(w_up, "w_up"), down = view(w_down, "w_down")
    check_floating(tokens, "received")
    check_experts(layer, tokens, up, down, dispatched)
    cdef Plans plans = layer._plans
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
    cdef SparedProducts products
    for chunk in range(C):
        home.wait_for(chunk)
        products = SparedProducts(layer, space, home.crossing(chunk))
        for begin, end in products.parts(L, 2 * a_weight):
            backend.grouped_glu(
                space, tokens, experts_of(up, begin, end), offsets_of(offsets, begin, end, C), row_token,
                config.activation, z, a, C, chunk,
            )
        for begin, end in products.parts(L, a_weight):
            backend.grouped_gemm(
                space, a, experts_of(down, begin, end), offsets_of(offsets, begin, end, C), None, True, y, C, chunk
            )
        backend.combine(space, y, *[home.part(array, chunk) for array in (receiving.token_rows, weights, rows)])
        home.start(chunk)
    return space.export(rows), None if z is None else space.export(z)


def run_experts_backward(layer, d_rows, received, kept_z, dispatched, w_up, w_down):
    config = layer.config
    cdef Array tokens = view(received, "received"), up = view(w_up, "w_up"), down = view(w_down, "w_down")
    cdef Array d_out = view(d_rows, "d_rows"), z
    check_floating(tokens, "received")
    cdef int W = router_dtype(tokens)
    check_experts(layer, tokens, up, down, dispatched)
    cdef Plans plans = layer._plans
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
    cdef SparedProducts products
    for chunk in range(C):
        products = SparedProducts(layer, space, home.crossing(chunk))
        if kept_z is None:
            # pa takes the recomputed activations only to be overwritten by the next stage
            for begin, end in products.parts(L, 2 * a_weight):
                backend.grouped_glu(
                    space, tokens, experts_of(up, begin, end), offsets_of(offsets, begin, end, C), row_token,
                    config.activation, z, pa, C, chunk,
                )
        home.wait_for(chunk)
        dp = space.empty((R, 1), W)  # only this chunk's rows are of use
        # In one: it writes dp of all rows, of other experts' too.
        space.spared = products.spared(L, a_weight)
        backend.grouped_glu_backward(
            space, d_out, down, offsets, row_token, row_weights, z, config.activation, dz, pa,
            dp.at(0, (R,), W), C, chunk,
        )
        space.spared = 0
        for begin, end in products.parts(L, 2 * a_weight):
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

        cdef SparedProducts products = SparedProducts(layer, space, crossing_last)
        cdef int64_t downs = products.experts(L, C * a_weight), ups = products.experts(L, 2 * C * a_weight)
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


cdef int check_experts(layer, Array received, Array up, Array down, dispatched) except -1:
    config = layer.config
    cdef int64_t L = len(layer.experts), H = config.d_model, I = config.ffn_dim // 2
    check_shape(received, "received", "[N, d_model]", sum(dispatched.sizes.received), H)
    check_shape(up, "w_up", "[experts of this rank, ffn_dim, d_model]", L, 2 * I, H)
    check_like(up, "w_up", received, "received")
    check_shape(down, "w_down", "[experts of this rank, d_model, ffn_dim // 2]", L, H, I)
    check_like(down, "w_down", received, "received")
    return 0


cdef Array experts_of(Array weights, int64_t begin, int64_t end):
    """The experts from one to another, of an Array of all."""
    cdef int64_t nbytes = weights.nbytes // weights.dims[0]
    return weights.at(begin * nbytes, (end - begin, weights.dims[1], weights.dims[2]), weights.dtype)


cdef Array offsets_of(Array offsets, int64_t begin, int64_t end, int chunks):
    """Their part of expert_offsets, in which each has so many chunks."""
    return offsets.at(4 * begin * chunks, ((end - begin) * chunks + 1,), INT32)


# --- beside exchanges ---

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


cdef class SparedProducts:
    """How many experts' products are launched beside an exchange: as many as it takes, all where it keeps no
    multiprocessors busy.
    """

    cdef Space space
    cdef int multiprocessors
    cdef double flop  # that is multiplied until ``nbytes`` have crossed, and was not given to products yet

    def __cinit__(self, layer, Space space, int64_t nbytes):
        self.space = space
        self.multiprocessors = layer.comm.multiprocessors
        self.flop = flop_beside(nbytes)

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
