"""The stages of a layer as public functions: check, view, allocate, call the backend."""

from typing import Any, NamedTuple

import numpy as np

from libc.stdint cimport int64_t

from .arrays cimport FLOAT32, FLOAT64, INT32, Array, Space, space_of, view
from .checks cimport (
    bias_of,
    check_apart,
    check_device,
    check_dtype,
    check_finite,
    check_floating,
    check_like,
    check_rows,
    check_shape,
    check_sums,
    check_widths,
    mask_of,
    output_of,
    router_dtype,
)

from .backend import backend_for
from .checks import check_config, check_type
from .config import DROP_POLICIES, MAX_EXPERTS, MoEConfig
from .errors import ConfigError, RoutingError, ShapeError
from .plan import RoutingPlan

MAKES_PLANS = "which make_plan and unpack_routing give"


class Routing(NamedTuple):
    """What ``route`` returns."""

    topk_idx: Any  # int32 [T, K]; -1 for tokens that valid_mask leaves out
    topk_weights: Any  # [T, K] router dtype
    tokens_per_expert: Any  # int32 [E], before anything is dropped
    losses: Any  # [3]: aux loss, z-loss (each times its coefficient), router entropy in nats
    logits: Any  # [T, E] router dtype


def route(x, gate_weight, config, *, expert_bias=None, valid_mask=None):
    """Choose each token's K experts and their weights.

    x [T, H] of any float dtype; gate_weight [E, H], dtype of x or float32; expert_bias [E] float32 (selection
    only); valid_mask [T] bool or uint8. Logits and all that follows are float32 (float64 for float64 x).
    Ties go to the lower expert index. Aux loss: Fedus et al. 2021, eq. 4; z-loss: Zoph et al. 2022, eq. 5.

    Raises ShapeError, DTypeError, DeviceError, LayoutError for arrays that do not fit.
    """
    check_config(config, MoEConfig)
    cdef Array tokens = view(x, "x")
    cdef int64_t E = config.num_experts, K = config.top_k, T
    check_shape(tokens, "x", "[T, d_model]", -1, config.d_model)
    check_floating(tokens, "x")
    T = tokens.dims[0]
    check_rows(T, K)
    cdef int W = router_dtype(tokens)
    cdef Array gate = view(gate_weight, "gate_weight")
    check_shape(gate, "gate_weight", "[num_experts, d_model]", E, config.d_model)
    check_device(gate, "gate_weight", tokens, "x")
    check_dtype(gate, "gate_weight", (tokens.dtype, W))
    cdef Array bias = bias_of(expert_bias, E, tokens), mask = mask_of(valid_mask, T, tokens)
    cdef Space space = space_of(x, tokens)
    backend = backend_for(space)
    logits = space.empty((T, E), W)
    topk_idx = space.empty((T, K), INT32)
    topk_weights = space.empty((T, K), W)
    tokens_per_expert = space.empty((E,), INT32)
    losses = space.empty((3,), W)
    backend.gate_logits(space, tokens, gate, logits)
    check_finite(space, logits)
    backend.route(space, config, logits, bias, mask, topk_idx, topk_weights, tokens_per_expert, losses, None)
    parts = (topk_idx, topk_weights, tokens_per_expert, losses, logits)
    return Routing(*[space.export(part) for part in parts])


def make_plan(topk_idx, topk_weights, num_experts, *, capacity=None, drop_policy="position", validate=True):
    """Sort (token, expert) pairs by expert, stably.

    topk_idx [T, K] int32 in 0..E-1, or -1 for a pair that goes nowhere; topk_weights [T, K] float32 or
    float64. ``capacity`` bounds an expert's rows; an overfull one keeps its first in token order
    ("position") or its heaviest ("probs", ties to the earlier token). ``validate=False`` skips the check of
    the indices, which reads them on the host and so waits for the device.

    Raises RoutingError for an index that is no expert; ShapeError, DTypeError, DeviceError, ConfigError.
    """
    cdef Array idx = view(topk_idx, "topk_idx")
    check_shape(idx, "topk_idx", "[T, K]", -1, -1)
    check_widths(idx, "topk_idx", "[T, K]")
    check_dtype(idx, "topk_idx", (<int>INT32,))
    cdef int64_t T = idx.dims[0], K = idx.dims[1]
    check_rows(T, K)
    cdef Array weights = view(topk_weights, "topk_weights")
    check_shape(weights, "topk_weights", "[T, K]", T, K)
    check_device(weights, "topk_weights", idx, "topk_idx")
    check_dtype(weights, "topk_weights", (<int>FLOAT32, <int>FLOAT64))
    _check_count("num_experts", num_experts, 1, MAX_EXPERTS)
    if capacity is not None:
        _check_count("capacity", capacity, 0, (1 << 31) - 1)
    if drop_policy not in DROP_POLICIES:
        raise ConfigError(f"drop_policy={drop_policy!r} is unknown; known: {', '.join(map(repr, DROP_POLICIES))}")
    cdef Space space = space_of(topk_idx, idx)
    if validate:
        _check_indices(space, idx, "topk_idx", -1, num_experts)
    expert_offsets = space.empty((num_experts + 1,), INT32)
    row_token = space.empty((T * K,), INT32)
    row_weights = space.empty((T * K,), weights.dtype)
    token_rows = space.empty((T, K), INT32)
    backend_for(space).sort(
        space, idx, weights, -1 if capacity is None else capacity, drop_policy,
        expert_offsets, row_token, row_weights, token_rows,
    )
    parts = (expert_offsets, row_token, row_weights, token_rows)
    return RoutingPlan(topk_idx, topk_weights, *[space.export(part) for part in parts])


def permute(x, plan, *, out=None):
    """[T, H] tokens to [T*K, H] rows sorted by expert; rows that belong to nobody are zero.

    Raises ShapeError, DTypeError, DeviceError, LayoutError for arrays that do not fit.
    """
    cdef Array tokens = view(x, "x")
    check_shape(tokens, "x", "[T, d_model]", -1, -1)
    check_widths(tokens, "x", "[T, d_model]")
    check_floating(tokens, "x")
    check_type(plan, "plan", RoutingPlan, MAKES_PLANS)
    cdef Array token_rows = _plan_index(plan.token_rows, "plan.token_rows", "[T, K]", tokens, "x")
    cdef Array row_token = _plan_index(plan.row_token, "plan.row_token", "[T * K]", tokens, "x")
    cdef Array offsets = _plan_index(plan.expert_offsets, "plan.expert_offsets", "[E + 1]", tokens, "x")
    if token_rows.dims[0] != tokens.dims[0]:
        raise ShapeError(f"x has {tokens.dims[0]} tokens but the plan was made for {token_rows.dims[0]}")
    check_shape(row_token, "plan.row_token", "[T * K]", token_rows.dims[0] * token_rows.dims[1])
    if offsets.dims[0] < 2:
        raise ShapeError(f"plan.expert_offsets has {offsets.dims[0]} entries; expected [E + 1], at least 2")
    cdef Space space = space_of(x, tokens)
    cdef Array rows = output_of(space, out, "out", (row_token.dims[0], tokens.dims[1]), tokens, "x")
    check_apart(rows, "out", tokens, "x")
    backend_for(space).permute(space, tokens, row_token, offsets, rows)
    return out if out is not None else space.export(rows)


def combine(rows, plan, *, weighted=True, out=None):
    """[T*K, H] rows to [T, H] tokens: each token's rows summed in the order of its K experts.

    Weighted by ``plan.topk_weights`` (whose dtype is float64 for float64 rows, else float32), or plainly.
    Dropped pairs add nothing. Accumulates in float32 (float64).

    Raises ShapeError, DTypeError, DeviceError, LayoutError for arrays that do not fit.
    """
    cdef Array source = view(rows, "rows")
    check_type(plan, "plan", RoutingPlan, MAKES_PLANS)
    cdef Array token_rows = _plan_index(plan.token_rows, "plan.token_rows", "[T, K]", source, "rows")
    cdef Array weights = None
    check_shape(source, "rows", "[T * K, d_model]", token_rows.dims[0] * token_rows.dims[1], -1)
    check_widths(source, "rows", "[T * K, d_model]")
    check_floating(source, "rows")
    if weighted:
        weights = view(plan.topk_weights, "plan.topk_weights")
        check_shape(weights, "plan.topk_weights", "[T, K]", token_rows.dims[0], token_rows.dims[1])
        check_device(weights, "plan.topk_weights", source, "rows")
        check_dtype(weights, "plan.topk_weights", (router_dtype(source),))
    cdef Space space = space_of(rows, source)
    cdef Array tokens = output_of(space, out, "out", (token_rows.dims[0], source.dims[1]), source, "rows")
    check_apart(tokens, "out", source, "rows")
    backend_for(space).combine(space, source, token_rows, weights, tokens)
    return out if out is not None else space.export(tokens)


def grouped_gemm(a, b, expert_offsets, *, row_index=None, transpose_b=True, out=None, validate=True):
    """One product for each group of rows: ``out[r] = a[r] @ b[e].T`` for r in group e.

    a [rows, K]; b [E, N, K] (``transpose_b``) or [E, K, N], dtype of a; expert_offsets [E+1] int32: group e
    is rows ``expert_offsets[e]:expert_offsets[e+1]`` of the [R, N] result; rows past the last group are
    zero. row_index [R] int32: row r of the product reads ``a[row_index[r]]``. Accumulates in float32
    (float64). ``validate=False`` skips the check of offsets and indices, which waits for the device.

    Raises RoutingError for offsets or indices out of range; ShapeError, DTypeError, DeviceError, LayoutError.
    """
    cdef Array left = view(a, "a"), right = view(b, "b"), index
    cdef Array offsets = view(expert_offsets, "expert_offsets")
    check_shape(left, "a", "[rows, K]", -1, -1)
    check_floating(left, "a")
    if transpose_b:
        check_shape(right, "b", "[num_experts, N, K]", -1, -1, left.dims[1])
    else:
        check_shape(right, "b", "[num_experts, K, N]", -1, left.dims[1], -1)
    check_widths(left, "a", "[rows, K]")
    check_widths(right, "b", "[num_experts, N, K]" if transpose_b else "[num_experts, K, N]")
    check_like(right, "b", left, "a")
    _check_offsets(offsets, right.dims[0], left, "a")
    cdef Space space = space_of(a, left)
    index = _row_index(space, row_index, "row_index", left, "a", validate)
    cdef int64_t num_rows = left.dims[0] if index is None else index.dims[0]
    check_rows(num_rows, 1)
    if validate:
        _check_offset_values(space, offsets, num_rows)
    cdef Array product = output_of(space, out, "out", (num_rows, right.dims[1 if transpose_b else 2]), left, "a")
    check_apart(product, "out", left, "a")
    check_apart(product, "out", right, "b")
    backend_for(space).grouped_gemm(space, left, right, offsets, index, bool(transpose_b), product)
    return out if out is not None else space.export(product)


def grouped_gemm_wgrad(
    a, b, expert_offsets, *, a_index=None, b_index=None, out=None, accumulate=False, validate=True
):
    """The weight-gradient twin: contracts each group's rows, ``out[e] = sum over r of outer(a[r], b[r])``.

    a [rows, M], b [rows, N] of one dtype; a_index, b_index [R] int32: row r reads ``a[a_index[r]]``. The
    result is [E, M, N]; groups without rows give zeros. ``out`` may have the dtype of a or float32 (float64
    for float64), into which the sums go without rounding; ``accumulate=True`` adds them to what ``out`` holds.
    See ``grouped_gemm`` for the rest.

    Raises ConfigError for ``accumulate=True`` without ``out``.
    """
    cdef Array left = view(a, "a"), right = view(b, "b"), left_index, right_index
    cdef Array offsets = view(expert_offsets, "expert_offsets")
    check_shape(left, "a", "[rows, M]", -1, -1)
    check_floating(left, "a")
    check_shape(right, "b", "[rows, N]", -1, -1)
    check_widths(left, "a", "[rows, M]")
    check_widths(right, "b", "[rows, N]")
    check_like(right, "b", left, "a")
    _check_offsets(offsets, -1, left, "a")
    cdef Space space = space_of(a, left)
    left_index = _row_index(space, a_index, "a_index", left, "a", validate)
    right_index = _row_index(space, b_index, "b_index", right, "b", validate)
    cdef int64_t left_rows = left.dims[0] if left_index is None else left_index.dims[0]
    cdef int64_t right_rows = right.dims[0] if right_index is None else right_index.dims[0]
    if left_rows != right_rows:
        raise ShapeError(f"a has {left_rows} rows but b has {right_rows}; they are contracted, so must agree")
    if validate:
        _check_offset_values(space, offsets, left_rows)
    cdef int64_t E = offsets.dims[0] - 1, M = left.dims[1], N = right.dims[1]
    cdef Array product
    if out is not None:
        product = view(out, "out")
        check_shape(product, "out", "[num_experts, M, N]", E, M, N)
        check_sums(out, product, "out", left, "a")
        check_apart(product, "out", left, "a")
        check_apart(product, "out", right, "b")
    elif accumulate:
        raise ConfigError("accumulate=True needs out=, the array to add to")
    else:
        product = space.empty((E, M, N), left.dtype)
    backend_for(space).grouped_gemm_wgrad(
        space, left, right, offsets, left_index, right_index, product, bool(accumulate)
    )
    return out if out is not None else space.export(product)


cdef Array _plan_index(object index, str name, str symbols, Array like, str like_name):
    """An int32 array of a RoutingPlan; ``symbols`` is its shape in an error, and tells its rank."""
    cdef Array array = view(index, name)
    if symbols.count(",") == 1:
        check_shape(array, name, symbols, -1, -1)
    else:
        check_shape(array, name, symbols, -1)
    check_dtype(array, name, (<int>INT32,))
    check_device(array, name, like, like_name)
    return array


cdef int _check_offsets(Array offsets, int64_t num_experts, Array like, str like_name) except -1:
    check_shape(offsets, "expert_offsets", "[num_experts + 1]", num_experts + 1 if num_experts >= 0 else -1)
    check_dtype(offsets, "expert_offsets", (<int>INT32,))
    check_device(offsets, "expert_offsets", like, like_name)
    if not 2 <= offsets.dims[0] <= MAX_EXPERTS + 1:
        raise ShapeError(
            f"expert_offsets has {offsets.dims[0]} entries; expected num_experts + 1 with "
            f"num_experts from 1 to {MAX_EXPERTS}"
        )
    return 0


cdef int _check_offset_values(Space space, Array offsets, int64_t num_rows) except -1:
    host = space.to_host(offsets)
    first, last = host.take([0, -1])
    if first != 0 or (np.diff(host.astype(np.int64)) < 0).any() or last > num_rows:
        raise RoutingError(
            f"expert_offsets must start at 0, never fall, and end at most at the number of rows {num_rows}; "
            f"it starts at {first}, ends at {last}"
        )
    return 0


cdef Array _row_index(Space space, object index, str name, Array source, str source_name, bint validate):
    if index is None:
        return None
    cdef Array array = view(index, name)
    check_shape(array, name, "[rows]", -1)
    check_dtype(array, name, (<int>INT32,))
    check_device(array, name, source, source_name)
    check_rows(array.dims[0], 1)
    if validate:
        _check_indices(space, array, name, 0, source.dims[0])
    return array


cdef int _check_indices(Space space, Array index, str name, int64_t low, int64_t high) except -1:
    """Every value in [low, high). Waits for the device."""
    host = space.to_host(index)
    if host.size and (host.min() < low or host.max() >= high):
        wrong = host[(host < low) | (host >= high)]
        raise RoutingError(
            f"{name} has {wrong.size} values outside {low} to {high - 1}, the first is {wrong.flat[0]}"
        )
    return 0


def _check_count(name, value, low, high):
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r} must be an int from {low} to {high}")
