"""The layer as a composition of stages: forward and backward, each one call.

No kernel, no dtype code and no tile size here: those are the backends'.
The mathematics, with T tokens, R = T*K rows, expert e of row r, weight p_r:

    z = W_up[e] x,   a = act(z[:I]) * z[I:],   y = W_down[e] a,   out = sum_k p_k y_k
    da' = W_down[e]^T dO,  dp = <da', a>,  da = p da',  dz = [da * u * act'(g), da * act(g)]
    dW_down[e] = sum dO (p a)^T,  dW_up[e] = sum dz x^T,  dx = sum_k W_up[e]^T dz_k + router
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from libc.stdint cimport int64_t

from .arrays cimport CPU, UINT8, Array, Space, itemsize, padded, space_of, view
from .checks cimport (
    bias_of,
    check_apart,
    check_device,
    check_dtype,
    check_finite,
    check_floating,
    check_like,
    check_output,
    check_rows,
    check_shape,
    check_writable,
    mask_of,
    router_dtype,
)

from .arrays import DTYPE_NAMES
from .backend import backend_for
from .checks import check_config, check_type
from .config import MoEConfig
from .errors import CapacityError, RoutingError, UnsupportedError
from .plan import RoutingPlan, routing_layout


class MoESaved(NamedTuple):
    """What backward needs beside the inputs."""

    logits: Any  # [T, E] router dtype, or None where config.keeps_logits is False
    z: Any  # [R, 2I] pre-activations, or None where they are recomputed
    routing: Any  # uint8 [n], see RoutingLayout


class MoEResult(NamedTuple):
    """What ``moe_forward`` returns."""

    output: Any  # [T, H]
    losses: Any  # [3] router dtype: aux loss, z-loss (each times its coefficient), router entropy in nats
    routing: Any  # uint8 [n], see RoutingLayout
    saved: MoESaved | None  # None without save_for_backward


class MoEGrads(NamedTuple):
    """What ``moe_backward`` returns: a gradient for each input, of its shape and dtype."""

    x: Any
    router_input: Any  # None where router_input was None (its gradient is in x)
    gate_weight: Any
    w_up: Any  # None where it was added to w_up_grad
    w_down: Any  # None where it was added to w_down_grad


cdef class RoutingParts:
    """The parts of a packed routing block."""

    def __cinit__(self, Array block, tuple parts):
        self.topk_idx = _part(block, parts[0])
        self.topk_weights = _part(block, parts[1])
        self.expert_offsets = _part(block, parts[2])
        self.row_token = _part(block, parts[3])
        self.row_weights = _part(block, parts[4])
        self.token_rows = _part(block, parts[5])
        self.tokens_per_expert = _part(block, parts[6])


cdef Array _part(Array block, tuple part):
    return block.at(part[0], part[1], part[2])


@lru_cache(maxsize=256)
def packed_layout(num_tokens, top_k, num_experts, dtype):
    """A routing block's bytes, and (offset, shape, dtype) of its parts in the order above."""
    layout = routing_layout(num_tokens, top_k, num_experts, DTYPE_NAMES[dtype])
    fields = [layout.fields[name] for name in (*RoutingPlan._fields, "tokens_per_expert")]
    return layout.nbytes, tuple([(f.offset, f.shape, DTYPE_NAMES.index(f.dtype)) for f in fields])


cdef class _Inputs:
    """The inputs both directions share, checked."""

    cdef Array x, router_input, gate_weight, w_up, w_down
    cdef Space space
    cdef object config
    cdef tuple routing_parts
    cdef int64_t routing_bytes, num_tokens, num_rows, hidden, intermediate, num_experts, top_k
    cdef int router_dtype

    def __cinit__(self, x, router_input, gate_weight, w_up, w_down, config):
        check_config(config, MoEConfig)
        self.config = config
        self.hidden = config.d_model
        self.intermediate = config.ffn_dim // 2
        self.num_experts = config.num_experts
        self.top_k = config.top_k
        self.x = view(x, "x")
        check_shape(self.x, "x", "[T, d_model]", -1, self.hidden)
        check_floating(self.x, "x")
        self.num_tokens = self.x.dims[0]
        check_rows(self.num_tokens, self.top_k)
        self.num_rows = self.num_tokens * self.top_k
        self.gate_weight = view(gate_weight, "gate_weight")
        check_shape(
            self.gate_weight, "gate_weight", "[num_experts, d_model]", self.num_experts, self.hidden
        )
        check_device(self.gate_weight, "gate_weight", self.x, "x")
        self.router_dtype = router_dtype(self.x)
        check_dtype(self.gate_weight, "gate_weight", (self.x.dtype, self.router_dtype))
        self.w_up = view(w_up, "w_up")
        check_shape(
            self.w_up, "w_up", "[num_experts, ffn_dim, d_model]",
            self.num_experts, 2 * self.intermediate, self.hidden,
        )
        check_like(self.w_up, "w_up", self.x, "x")
        self.w_down = view(w_down, "w_down")
        check_shape(
            self.w_down, "w_down", "[num_experts, d_model, ffn_dim // 2]",
            self.num_experts, self.hidden, self.intermediate,
        )
        check_like(self.w_down, "w_down", self.x, "x")
        self.router_input = self.x
        if router_input is not None:
            self.router_input = view(router_input, "router_input")
            check_shape(
                self.router_input, "router_input", "[T, d_model]", self.num_tokens, self.hidden
            )
            check_like(self.router_input, "router_input", self.x, "x")
        self.space = space_of(x, self.x)
        self.routing_bytes, self.routing_parts = packed_layout(
            self.num_tokens, self.top_k, self.num_experts, self.router_dtype
        )

    cdef int check_apart_from(self, Array out, str name) except -1:
        """An output that overlaps none of the inputs."""
        check_apart(out, name, self.x, "x")
        check_apart(out, name, self.router_input, "router_input")
        check_apart(out, name, self.gate_weight, "gate_weight")
        check_apart(out, name, self.w_up, "w_up")
        check_apart(out, name, self.w_down, "w_down")
        return 0


def moe_forward(
    x,
    gate_weight,
    w_up,
    w_down,
    config,
    *,
    router_input=None,
    expert_bias=None,
    valid_mask=None,
    save_for_backward=True,
    out=None,
):
    """The routed experts' weighted output for every token.

    Parameters
    ----------
    x : [T, H], float32, float64, bfloat16 or float16. T may be 0.
    gate_weight : [E, H], dtype of x, or float32.
    w_up : [E, 2I, H], dtype of x; gate rows first, then up rows.
    w_down : [E, H, I], dtype of x.
    router_input : [T, H], dtype of x: what the gate reads instead of x.
    expert_bias : [E] float32, added to the scores for the selection only.
    valid_mask : [T] bool or uint8; tokens with 0 are ignored: no expert, zero output, no part in losses.
        What they hold must be finite all the same.
    save_for_backward : False when no backward will follow; the result's ``saved`` is then None.
    out : [T, H], dtype of x: where to write the output.

    The router computes in float32 (float64 for float64 x), the experts accumulate in float32 (float64).
    Nothing waits for the device, unless ``allow_dropped_tokens=False`` meets a capacity bound, or the
    environment has ``FFMOE_CHECK=1``.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError : an array does not fit, before any work starts.
    CapacityError : more rows than the bound with ``allow_dropped_tokens=False``.
    NonFiniteError : checked mode (``FFMOE_CHECK=1``) found NaN or infinite logits.
    OutOfMemoryError : no room; nothing is lost, and a smaller call works.
    MissingDependencyError : arrays on a GPU without CuPy.
    """
    cdef _Inputs inputs = _Inputs(x, router_input, gate_weight, w_up, w_down, config)
    cdef Space space = inputs.space
    cdef int64_t T = inputs.num_tokens, R = inputs.num_rows, H = inputs.hidden
    cdef int64_t I = inputs.intermediate, E = inputs.num_experts
    cdef int dtype = inputs.x.dtype
    cdef Array bias = bias_of(expert_bias, E, inputs.x), mask = mask_of(valid_mask, T, inputs.x)
    cdef Array output, z = None
    if out is not None:
        output = view(out, "out")
        check_shape(output, "out", "[T, d_model]", T, H)
        check_output(out, output, "out", inputs.x, "x")
        inputs.check_apart_from(output, "out")
    else:
        output = space.empty((T, H), dtype)
    backend = backend_for(space)

    cdef int W = inputs.router_dtype
    cdef int64_t y_at = padded(R * I * itemsize(dtype))
    cdef int64_t logits_at = y_at + padded(R * H * itemsize(dtype))
    cdef bint keep_logits = save_for_backward and config.keeps_logits
    cdef int64_t end = logits_at if keep_logits else logits_at + T * E * itemsize(W)
    cdef Array scratch = space.empty((end,), UINT8)
    cdef Array a = scratch.at(0, (R, I), dtype), y = scratch.at(y_at, (R, H), dtype)
    cdef Array logits = space.empty((T, E), W) if keep_logits else scratch.at(logits_at, (T, E), W)
    cdef Array losses = space.empty((3,), W)
    cdef Array block = space.empty((inputs.routing_bytes,), UINT8)
    cdef RoutingParts routing = RoutingParts(block, inputs.routing_parts)
    backend.gate_logits(space, inputs.router_input, inputs.gate_weight, logits)
    check_finite(space, logits)
    capacity = config.capacity(T)
    backend.route_and_sort(
        space, config, logits, bias, mask, -1 if capacity is None else capacity,
        routing.topk_idx, routing.topk_weights, routing.tokens_per_expert, losses, None,
        routing.expert_offsets, routing.row_token, routing.row_weights, routing.token_rows,
    )
    if capacity is not None and not config.allow_dropped_tokens:
        check_capacity(space, routing.tokens_per_expert, capacity)

    if save_for_backward and not config.recompute_activations:
        z = space.empty((R, 2 * I), dtype)
    backend.grouped_glu(
        space, inputs.x, inputs.w_up, routing.expert_offsets, routing.row_token, config.activation, z, a
    )
    backend.grouped_gemm(space, a, inputs.w_down, routing.expert_offsets, None, True, y)
    backend.combine(space, y, routing.token_rows, routing.topk_weights, output)
    kept = space.export(block)
    saved = None
    if save_for_backward:
        saved = MoESaved(
            space.export(logits) if keep_logits else None, None if z is None else space.export(z), kept
        )
    return MoEResult(out if out is not None else space.export(output), space.export(losses), kept, saved)


def moe_backward(
    grad_output,
    saved,
    x,
    gate_weight,
    w_up,
    w_down,
    config,
    *,
    router_input=None,
    grad_losses=None,
    w_up_grad=None,
    w_down_grad=None,
):
    """Every gradient of ``moe_forward``, for the same inputs and what it saved.

    Parameters
    ----------
    grad_output : [T, H], dtype of x.
    saved : ``result.saved`` of the forward call with this config. A ``z`` of None is recomputed, with the same
        bits.
    grad_losses : [3], router dtype: the gradient of ``result.losses``; the third entry (the entropy, a
        statistic) is ignored. None is zeros.
    w_up_grad, w_down_grad : float32 (float64 for float64 x), shapes of w_up and w_down: the weight's gradient
        is added to it, unrounded, and the result has None in its place. After an error in the middle of the
        call, such as OutOfMemoryError, it may have been added or not.

    Raises what ``moe_forward`` raises for arrays that do not fit, and UnsupportedError for what a forward
    call with ``save_for_backward=False`` left.
    """
    cdef _Inputs inputs = _Inputs(x, router_input, gate_weight, w_up, w_down, config)
    cdef Space space = inputs.space
    cdef int64_t T = inputs.num_tokens, R = inputs.num_rows, H = inputs.hidden
    cdef int64_t I = inputs.intermediate, E = inputs.num_experts
    cdef int dtype = inputs.x.dtype, W = inputs.router_dtype
    cdef Array d_out = view(grad_output, "grad_output")
    check_shape(d_out, "grad_output", "[T, d_model]", T, H)
    check_like(d_out, "grad_output", inputs.x, "x")
    if saved is None:
        raise UnsupportedError(
            "saved is None: the forward call had save_for_backward=False, which keeps nothing for backward"
        )
    check_type(saved, "saved", MoESaved, "which is the saved of a MoEResult")
    cdef Array logits = None
    if config.keeps_logits:
        logits = view(saved.logits, "saved.logits")
        check_shape(logits, "saved.logits", "[T, num_experts]", T, E)
        check_device(logits, "saved.logits", inputs.x, "x")
        check_dtype(logits, "saved.logits", (W,))
    cdef Array block = view(saved.routing, "saved.routing")
    check_shape(block, "saved.routing", "[RoutingLayout.nbytes]", inputs.routing_bytes)
    check_device(block, "saved.routing", inputs.x, "x")
    check_dtype(block, "saved.routing", (<int>UINT8,))
    cdef Array d_losses = None, z
    if grad_losses is not None:
        d_losses = view(grad_losses, "grad_losses")
        check_shape(d_losses, "grad_losses", "[3]", 3)
        check_device(d_losses, "grad_losses", inputs.x, "x")
        check_dtype(d_losses, "grad_losses", (W,))
    cdef RoutingParts routing = RoutingParts(block, inputs.routing_parts)
    cdef Array dw_up = sums_of(w_up_grad, "w_up_grad", "[num_experts, ffn_dim, d_model]", inputs.w_up)
    cdef Array dw_down = sums_of(w_down_grad, "w_down_grad", "[num_experts, d_model, ffn_dim // 2]", inputs.w_down)
    for sums, name in ((dw_up, "w_up_grad"), (dw_down, "w_down_grad")):
        if sums is not None:
            inputs.check_apart_from(sums, name)
            check_apart(sums, name, d_out, "grad_output")
    if dw_up is not None and dw_down is not None:
        check_apart(dw_up, "w_up_grad", dw_down, "w_down_grad")
    if inputs.x.device_type == CPU:
        _check_plan(space, routing, T, E)
    backend = backend_for(space)

    # pa and then dx_rows stand in the same place
    cdef int64_t dp_at = padded(R * max(I, H) * itemsize(dtype))
    cdef int64_t d_logits_at = dp_at + padded(R * itemsize(W))
    cdef Array chosen = routing.topk_idx if config.sparse_gradient else None
    cdef int64_t with_gradient = E if chosen is None else config.top_k  # of a token's logits
    cdef Array scratch = space.empty((d_logits_at + T * with_gradient * itemsize(W),), UINT8)
    cdef Array pa = scratch.at(0, (R, I), dtype), dx_rows = scratch.at(0, (R, H), dtype)
    cdef Array dp = scratch.at(dp_at, (R,), W), d_logits = scratch.at(d_logits_at, (T, with_gradient), W)
    if saved.z is not None:
        z = view(saved.z, "saved.z")
        check_shape(z, "saved.z", "[T * top_k, ffn_dim]", R, 2 * I)
        check_like(z, "saved.z", inputs.x, "x")
    else:
        z = space.empty((R, 2 * I), dtype)
        # pa takes the recomputed activations only to be overwritten by the next stage
        backend.grouped_glu(
            space, inputs.x, inputs.w_up, routing.expert_offsets, routing.row_token, config.activation, z, pa
        )
    cdef Array dz = space.empty((R, 2 * I), dtype)
    backend.grouped_glu_backward(
        space, d_out, inputs.w_down, routing.expert_offsets, routing.row_token, routing.row_weights, z,
        config.activation, dz, pa, dp,
    )
    z = None  # memory that is not needed any more can serve again before the call ends
    if w_down_grad is None:
        dw_down = space.empty((E, H, I), dtype)
    backend.grouped_gemm_wgrad(
        space, d_out, pa, routing.expert_offsets, routing.row_token, None, dw_down, w_down_grad is not None
    )
    if w_up_grad is None:
        dw_up = space.empty((E, 2 * I, H), dtype)
    backend.grouped_gemm_wgrad(
        space, dz, inputs.x, routing.expert_offsets, None, routing.row_token, dw_up, w_up_grad is not None
    )
    backend.grouped_gemm(space, dz, inputs.w_up, routing.expert_offsets, None, False, dx_rows)
    dz = None
    backend.route_backward(
        space, config, logits, routing.topk_idx, routing.topk_weights, routing.tokens_per_expert,
        routing.token_rows, dp, d_losses, d_logits,
    )
    cdef Array d_gate = space.empty((E, H), inputs.gate_weight.dtype)
    cdef Array dx = space.empty((T, H), dtype), d_router = None
    if router_input is None:
        backend.gate_backward(
            space, d_logits, inputs.x, inputs.gate_weight, dx_rows, routing.token_rows, dx, d_gate, chosen
        )
    else:
        d_router = space.empty((T, H), dtype)
        backend.combine(space, dx_rows, routing.token_rows, None, dx)
        backend.gate_backward(
            space, d_logits, inputs.router_input, inputs.gate_weight, None, None, d_router, d_gate, chosen
        )
    return MoEGrads(
        space.export(dx),
        None if d_router is None else space.export(d_router),
        space.export(d_gate),
        space.export(dw_up) if w_up_grad is None else None,
        space.export(dw_down) if w_down_grad is None else None,
    )


cdef int _check_plan(Space space, RoutingParts routing, int64_t num_tokens, int64_t num_experts) except -1:
    """A plan that names nothing but what is there. Of another call's ``saved`` the shapes may well fit.

    On a GPU this would wait for the device.
    """
    cdef int64_t num_rows = routing.row_token.size
    offsets = space.to_host(routing.expert_offsets)
    first, rows = offsets.take([0, -1])
    fits = first == 0 and (np.diff(offsets) >= 0).all() and rows <= num_rows
    for part, low, high in (
        (routing.row_token, 0, num_tokens), (routing.token_rows, -1, num_rows), (routing.topk_idx, -1, num_experts),
    ):
        named = space.to_host(part)
        if part is routing.row_token:
            named = named[:rows]  # the others are nobody's
        fits = fits and (named.size == 0 or (named.min() >= low and named.max() < high))
    if not fits:
        raise RoutingError(
            "saved.routing names rows or experts that are not there: it is of no forward call with "
            f"{num_tokens} tokens and this config; pass result.saved of the call with this x"
        )
    return 0


cdef Array sums_of(object buffer, str name, str symbols, Array weight):
    """What a weight's gradient is to be added to, checked; None where it is to be an array of its own."""
    if buffer is None:
        return None
    cdef Array array = view(buffer, name)
    check_shape(array, name, symbols, weight.dims[0], weight.dims[1], weight.dims[2])
    check_device(array, name, weight, "x")
    check_dtype(array, name, (router_dtype(weight),))
    check_writable(buffer, array, name)
    return array


def check_capacity(Space space, Array tokens_per_expert, capacity):
    """An overflow of the bound is an error. Waits for the device."""
    counts = space.to_host(tokens_per_expert)
    over = np.flatnonzero(counts > capacity)
    if over.size:
        listed = ", ".join(f"expert {e}: {counts[e]} rows" for e in over[:8])
        raise CapacityError(
            f"{over.size} of {counts.size} experts got more than {capacity} rows ({listed}"
            f"{', ...' if over.size > 8 else ''}); raise capacity_factor or max_tokens_per_expert, "
            "or set allow_dropped_tokens=True"
        )
