"""A dense GLU block, w_down (act(gate) * up) with [gate, up] = w_up x, as grouped products with a single group.

The mathematics is that of moe.pyx with one expert whose rows are the tokens, all of weight 1.
"""

import math

from libc.stdint cimport int64_t

from .arrays cimport INT32, UINT8, Array, Space, itemsize, padded, space_of, view
from .checks cimport (
    check_apart,
    check_floating,
    check_like,
    check_rows,
    check_shape,
    check_widths,
    output_of,
    router_dtype,
)

from .backend import backend_for
from .config import ACTIVATIONS
from .errors import ConfigError, ShapeError

cdef enum:
    OFFSETS_BYTES = 12
    # Pieces end where tiles do, and a second one has so many of that size at least.
    PIECE_ROWS = 256
    MORE_PIECES = 4


def glu_up(x, w_up, activation="swiglu", *, keep_z=True, out=None, spared=0, spared_flop=math.inf):
    """The first half of a dense GLU block: ``z = x @ w_up.T`` and ``a = act(z[:, :J]) * z[:, J:]``.

    x [T, H] of any float dtype, T may be 0; w_up [2J, H], dtype of x, gate rows first, then up rows;
    ``activation``: "swiglu", "geglu" (tanh approximation) or "relu_squared". Returns (a [T, J], z [T, 2J]), both
    of x's dtype; z is what backward needs, and None with ``keep_z=False``. Accumulates in float32 (float64), and
    a comes from the unrounded z. ``out``: arrays for both, (a, z), which are returned; z None with ``keep_z=False``.
    Nothing waits for the device.

    ``spared``: multiprocessors of a Hopper GPU left to other work, such as an exchange between GPUs, during the first
    ``spared_flop`` floating-point operations, an estimate of what fits until that work is done. The rest is a second
    launch that takes all multiprocessors. Other devices ignore it.

    Raises ShapeError, DTypeError, DeviceError, LayoutError for arrays that do not fit, ConfigError for an unknown
    activation, an ``out`` that is no such pair, and a ``spared`` or ``spared_flop`` out of range, OutOfMemoryError, and
    MissingDependencyError for arrays on a GPU without CuPy.
    """
    cdef Array tokens = tokens_of(x, "x", "[T, d_model]"), weight = view(w_up, "w_up")
    cdef int64_t T = tokens.dims[0], H = tokens.dims[1]
    cdef int64_t J = check_up(weight, tokens, "x")
    check_activation(activation)
    cdef Space space = space_of(x, tokens)
    backend = backend_for(space)
    given_a, given_z = pair_of(out, keep_z)
    cdef Array a = output_of(space, given_a, "out[0]", (T, J), tokens, "x"), z = None
    apart(a, "out[0]", ((tokens, "x"), (weight, "w_up")))
    if keep_z:
        z = output_of(space, given_z, "out[1]", (T, 2 * J), tokens, "x")
        apart(z, "out[1]", ((tokens, "x"), (weight, "w_up"), (a, "out[0]")))
    cdef Pieces pieces = Pieces(spared, spared_flop, T, 4.0 * H * J)
    cdef Array offsets = pieces.offsets(backend, space, space.empty((OFFSETS_BYTES,), UINT8))
    for piece in pieces.each(space):
        backend.grouped_glu(
            space, tokens, weight.at(0, (1, 2 * J, H), weight.dtype), offsets, None, activation, z, a,
            pieces.count, piece,
        )
    if out is not None:
        return given_a, given_z
    return space.export(a), None if z is None else space.export(z)


def glu_down(a, w_down, *, out=None, spared=0, spared_flop=math.inf):
    """The second half: ``a @ w_down.T``, [T, H] in the dtype of a, for a [T, J] and w_down [H, J].

    ``out``: [T, H], where to write it. See ``glu_up`` for the rest.
    """
    cdef Array rows = tokens_of(a, "a", "[T, width]"), weight = view(w_down, "w_down")
    cdef int64_t T = rows.dims[0], J = rows.dims[1]
    check_down(weight, -1, J, rows, "a")
    cdef int64_t H = weight.dims[0]
    cdef Space space = space_of(a, rows)
    backend = backend_for(space)
    cdef Array output = output_of(space, out, "out", (T, H), rows, "a")
    apart(output, "out", ((rows, "a"), (weight, "w_down")))
    cdef Pieces pieces = Pieces(spared, spared_flop, T, 2.0 * H * J)
    cdef Array offsets = pieces.offsets(backend, space, space.empty((OFFSETS_BYTES,), UINT8))
    for piece in pieces.each(space):
        backend.grouped_gemm(
            space, rows, weight.at(0, (1, H, J), weight.dtype), offsets, None, True, output, pieces.count, piece
        )
    return out if out is not None else space.export(output)


def glu_down_backward(
    grad_output, z, w_down, activation="swiglu", *, weight_grad=True, spared=0, spared_flop=math.inf
):
    """Gradients of ``glu_down(a, w_down)`` for the z that a is made of: (dz [T, 2J], dw_down [H, J]).

    grad_output [T, H]; z [T, 2J] as ``glu_up`` gave it, w_down [H, J], both of grad_output's dtype, and so are the
    results. a is computed again from z. dw_down is None with ``weight_grad=False``; its product ignores ``spared``.

    See ``glu_up`` for the rest.
    """
    cdef Array d_out = tokens_of(grad_output, "grad_output", "[T, d_model]"), weight = view(w_down, "w_down")
    cdef int64_t T = d_out.dims[0], H = d_out.dims[1]
    check_down(weight, H, -1, d_out, "grad_output")
    cdef int64_t J = weight.dims[1]
    cdef Array kept = view(z, "z")
    check_shape(kept, "z", "[T, 2 * width]", T, 2 * J)
    check_like(kept, "z", d_out, "grad_output")
    check_activation(activation)
    cdef Space space = space_of(grad_output, d_out)
    backend = backend_for(space)
    cdef Pieces pieces = Pieces(spared, spared_flop, T, 2.0 * H * J)
    cdef int W = router_dtype(d_out)
    cdef int64_t ones_at = padded(OFFSETS_BYTES), dp_at = ones_at + padded(T * itemsize(W))
    cdef int64_t a_at = dp_at + padded(T * itemsize(W))
    cdef Array scratch = space.empty((a_at + T * J * itemsize(d_out.dtype),), UINT8)
    cdef Array offsets = pieces.offsets(backend, space, scratch)
    cdef Array ones = scratch.at(ones_at, (T,), W), dp = scratch.at(dp_at, (T,), W)
    cdef Array a = scratch.at(a_at, (T, J), d_out.dtype)
    cdef Array dz = space.empty((T, 2 * J), d_out.dtype), dw_down = None
    backend.fill(space, ones, 1.0)
    for piece in pieces.each(space):
        backend.grouped_glu_backward(
            space, d_out, weight.at(0, (1, H, J), weight.dtype), offsets, None, ones, kept, activation, dz, a, dp,
            pieces.count, piece,
        )
    if weight_grad:
        dw_down = wgrad(backend, space, d_out, a, offsets, pieces.count)
    return space.export(dz), None if dw_down is None else space.export(dw_down)


def glu_up_backward(dz, x, w_up, *, x_grad=True, weight_grad=True):
    """Gradients of ``z`` in ``glu_up(x, w_up)``: (dx [T, H], dw_up [2J, H]), in the dtype of x.

    dz [T, 2J] as ``glu_down_backward`` gives it. dx is None with ``x_grad=False``, dw_up with ``weight_grad=False``.

    Raises the errors of ``glu_up``.
    """
    cdef Array tokens = tokens_of(x, "x", "[T, d_model]"), weight = view(w_up, "w_up")
    cdef int64_t T = tokens.dims[0], H = tokens.dims[1]
    cdef int64_t J = check_up(weight, tokens, "x")
    cdef Array rows = view(dz, "dz")
    check_shape(rows, "dz", "[T, 2 * width]", T, 2 * J)
    check_like(rows, "dz", tokens, "x")
    cdef Space space = space_of(dz, rows)
    backend = backend_for(space)
    cdef Pieces whole = Pieces(0, 0.0, T, 0.0)
    cdef Array offsets = whole.offsets(backend, space, space.empty((OFFSETS_BYTES,), UINT8))
    cdef Array dx = None, dw_up = None
    if x_grad:
        dx = space.empty((T, H), tokens.dtype)
        backend.grouped_gemm(space, rows, weight.at(0, (1, 2 * J, H), weight.dtype), offsets, None, False, dx)
    if weight_grad:
        dw_up = wgrad(backend, space, rows, tokens, offsets, whole.count)
    return None if dx is None else space.export(dx), None if dw_up is None else space.export(dw_up)


cdef class Pieces:
    """A product's rows, of which those of the first piece leave multiprocessors to others.

    They are the group's rows in chunks, as the stages have them: one where all are alike.
    """

    cdef int spared
    cdef int count
    cdef int64_t num_rows, first  # rows of the first piece

    def __cinit__(self, object spared, object spared_flop, int64_t num_rows, double flop_a_row):
        if isinstance(spared, bool) or not isinstance(spared, int) or not 0 <= spared < 1 << 16:
            raise ConfigError(f"spared={spared!r} must be an int from 0 to {(1 << 16) - 1}")
        if isinstance(spared_flop, bool) or not isinstance(spared_flop, (int, float)) or not spared_flop >= 0:
            raise ConfigError(f"spared_flop={spared_flop!r} must be a number of at least 0")
        self.spared = spared if spared_flop > 0 else 0
        self.num_rows = self.first = num_rows
        self.count = 1
        if self.spared == 0 or spared_flop >= num_rows * flop_a_row:
            return
        cdef int64_t first = (<int64_t>(<double>spared_flop / flop_a_row) + PIECE_ROWS - 1) // PIECE_ROWS * PIECE_ROWS
        # a launch for a few rows costs more than what they would spare in vain
        if num_rows - first >= PIECE_ROWS * MORE_PIECES:
            self.first = first
            self.count = 2

    cdef Array offsets(self, backend, Space space, Array scratch):
        """expert_offsets of the one group, at the start of ``scratch``. They never pass through the host."""
        cdef list ends = [0, self.first, self.num_rows][: self.count] + [self.num_rows]
        for i, row in enumerate(ends):
            backend.fill(space, scratch.at(4 * i, (1,), INT32), row)
        return scratch.at(0, (self.count + 1,), INT32)

    def each(self, Space space):
        """The pieces' numbers, one after the other, with ``space`` made ready for products of each."""
        for piece in range(self.count):
            space.spared = self.spared if piece == 0 else 0
            yield piece
        space.spared = 0


cdef Array wgrad(backend, Space space, Array a, Array b, Array offsets, int pieces):
    """[M, N] of a [T, M] and b [T, N]. Its blocks draw their tiles: they need not leave room to what is running."""
    cdef Array gradient = space.empty((a.dims[1], b.dims[1]), a.dtype)
    backend.grouped_gemm_wgrad(
        space, a, b, offsets, None, None, gradient.at(0, (1, a.dims[1], b.dims[1]), a.dtype), False, 1.0, pieces
    )
    return gradient


cdef tuple pair_of(object out, bint keep_z):
    """a and z of glu_up's ``out=``."""
    if out is None:
        return None, None
    if not isinstance(out, tuple) or len(out) != 2 or out[0] is None or (out[1] is not None) != keep_z:
        raise ConfigError(f"out must be a pair (a, {'z' if keep_z else 'None'}) with keep_z={bool(keep_z)}")
    return out


cdef int apart(Array out, str name, tuple others) except -1:
    for other, other_name in others:
        check_apart(out, name, other, other_name)
    return 0


cdef Array tokens_of(object obj, str name, str symbols):
    cdef Array tokens = view(obj, name)
    check_shape(tokens, name, symbols, -1, -1)
    check_widths(tokens, name, symbols)
    check_floating(tokens, name)
    check_rows(tokens.dims[0], 1)
    return tokens


cdef int64_t check_up(Array w_up, Array x, str x_name) except -1:
    """The block's width, which w_up has twice."""
    check_shape(w_up, "w_up", "[2 * width, d_model]", -1, x.dims[1])
    check_like(w_up, "w_up", x, x_name)
    if w_up.dims[0] == 0 or w_up.dims[0] % 2:
        raise ShapeError(
            f"w_up has shape {w_up.shape}; expected [2 * width, d_model], gate rows and as many up rows"
        )
    return w_up.dims[0] // 2


cdef int check_down(Array w_down, int64_t hidden, int64_t width, Array like, str like_name) except -1:
    check_shape(w_down, "w_down", "[d_model, width]", hidden, width)
    if w_down.size == 0:
        raise ShapeError(f"w_down has shape {w_down.shape}; expected [d_model, width] with widths of at least 1")
    return check_like(w_down, "w_down", like, like_name)


def check_activation(activation):
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ConfigError(f"activation={activation!r} is unknown; known: {known}")
