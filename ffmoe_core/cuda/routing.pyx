"""The router's kernels: grids, scratch and arguments. The mathematics is in kernels/routing.cu."""

from libc.stdint cimport int32_t, int64_t

from ..arrays cimport FLOAT32, FLOAT64, UINT8, Array, Space, itemsize
from . cimport gate_logits_few, gate_logits_sm90, gate_wgrad_sm90, router_dx
from .dense_gemm cimport dense_gemm
from .grouped_gemm cimport divided_up
from .launch cimport Parameter, kernel
from .placement cimport Plan, Slots, in_chunks, place_bytes

from .permute import sort

cdef enum:
    PLAN_THREADS = 1024
    MOST_PLAN_BYTES = 65536  # of shared memory, for the most experts
    FEW = 256  # pairs that one block can do all of; the same as in kernels/routing.cu
    FEW_TOKENS = 4  # for each of its warps
    BACKWARD_WARPS = 8
    BACKWARD_BLOCKS = 512
    SPREAD_WARPS = 8

# The experts a lane can hold: any number up to 32 fits the last, fewer are faster.
cdef tuple _PER_LANE = (1, 2, 4, 8, 16, 32)
cdef tuple _PER_LANE_FLOAT64 = (4, 32)
cdef dict _DEFINES = {
    (dtype, per_lane): (f"W_TYPE={dtype}", f"EXPERTS_PER_LANE={per_lane}")
    for dtype, choices in ((<int>FLOAT32, _PER_LANE), (<int>FLOAT64, _PER_LANE_FLOAT64))
    for per_lane in choices
}
cdef dict _SPREAD_DEFINES = {dtype: (f"W_TYPE={dtype}",) for dtype in (<int>FLOAT32, <int>FLOAT64)}


def variants():
    """Every (file, entry, defines) that these stages can launch."""
    return [
        ("routing.cu", entry, defines)
        for defines in _DEFINES.values()
        for entry in ("route", "route_plan", "route_few", "router_losses", "route_backward", "route_backward_chosen")
    ] + [("spread.cu", "spread", defines) for defines in _SPREAD_DEFINES.values()]


cdef int _per_lane(int dtype, int64_t num_experts) except -1:
    for per_lane in _PER_LANE_FLOAT64 if dtype == FLOAT64 else _PER_LANE:
        if 32 * per_lane >= num_experts:
            break
    return per_lane


# The same as in kernels/routing.cu.
cdef struct Router:
    int64_t num_tokens
    int32_t num_experts
    int32_t top_k
    int32_t num_groups
    int32_t topk_groups
    int32_t sigmoid
    int32_t normalise
    double scale
    double aux_coeff
    double z_coeff


cdef Router _router(config, int64_t num_tokens):
    cdef Router out
    out.num_tokens = num_tokens
    out.num_experts = config.num_experts
    out.top_k = config.top_k
    out.num_groups = config.num_expert_groups or 0
    out.topk_groups = config.topk_groups or 0
    out.sigmoid = config.gating == "sigmoid"
    out.normalise = config.norm_topk_prob
    out.scale = config.routed_scaling_factor
    out.aux_coeff = config.aux_loss_coeff
    out.z_coeff = config.z_loss_coeff
    return out


# The same as in kernels/routing.cu.
cdef struct Sums:
    void* scores
    void* counts
    void* losses
    void* tokens_per_expert
    void* results
    void* totals


def gate_logits(Space space, Array x, Array gate_weight, Array logits):
    if gate_logits_few.serves(x, gate_weight, logits):
        gate_logits_few.gate_logits(space, x, gate_weight, logits)
    elif gate_logits_sm90.serves(space, x, gate_weight, logits):
        gate_logits_sm90.gate_logits(space, x, gate_weight, logits)
    else:
        dense_gemm(space, x, gate_weight, logits, False, True)


def gate_backward(
    Space space, Array dlogits, Array x, Array gate_weight, Array rows, Array token_rows, Array dx,
    Array dgate_weight, Array topk_idx=None,
):
    cdef Array whole = dlogits if topk_idx is None else None  # [T, E]
    if dx is not None:
        if topk_idx is not None and rows is not None and router_dx.serves(dlogits, gate_weight, rows, dx):
            router_dx.router_dx(space, dlogits, topk_idx, gate_weight, rows, token_rows, dx)
        else:
            if whole is None:
                whole = _spread(space, dlogits, topk_idx, gate_weight.dims[0])
            dense_gemm(space, whole, gate_weight, dx, False, False, rows, token_rows)
    if dgate_weight is None:
        return
    if gate_wgrad_sm90.serves(space, dlogits, x, dgate_weight):
        gate_wgrad_sm90.gate_wgrad(space, dlogits, topk_idx, x, dgate_weight)
    else:
        if whole is None:
            whole = _spread(space, dlogits, topk_idx, gate_weight.dims[0])
        dense_gemm(space, whole, x, dgate_weight, True, False)


cdef Array _spread(Space space, Array chosen, Array topk_idx, int64_t num_experts):
    """[T, E] from the chosen experts' [T, K]: zeros elsewhere."""
    cdef Array out = space.empty((chosen.dims[0], num_experts), chosen.dtype)
    cdef int32_t experts = <int32_t>num_experts, top_k = <int32_t>chosen.dims[1]
    cdef int64_t num_tokens = chosen.dims[0]
    cdef Parameter[6] params = [&chosen.data, &topk_idx.data, &out.data, &num_tokens, &experts, &top_k]
    if num_tokens > 0:
        kernel("spread.cu", "spread", _SPREAD_DEFINES[chosen.dtype], space.device_id, 0).launch(
            <unsigned int>divided_up(num_tokens, SPREAD_WARPS), 1, 1, 32 * SPREAD_WARPS, 0, space.stream, params,
        )
    return out


def route(
    Space space, config, Array logits, Array expert_bias, Array valid_mask,
    Array topk_idx, Array topk_weights, Array tokens_per_expert, Array losses, Array sums,
):
    cdef Plan nothing = [NULL, NULL, NULL, NULL, NULL, NULL, NULL]
    _route(
        space, config, logits, expert_bias, valid_mask, -1, topk_idx, topk_weights, tokens_per_expert, losses,
        sums, nothing,
    )


def route_and_sort(
    Space space, config, Array logits, Array expert_bias, Array valid_mask, capacity,
    Array topk_idx, Array topk_weights, Array tokens_per_expert, Array losses, Array sums,
    Array expert_offsets, Array row_token, Array row_weights, Array token_rows,
):
    if capacity >= 0 and config.drop_policy == "probs":
        route(
            space, config, logits, expert_bias, valid_mask, topk_idx, topk_weights, tokens_per_expert, losses,
            sums,
        )
        sort(
            space, topk_idx, topk_weights, capacity, config.drop_policy,
            expert_offsets, row_token, row_weights, token_rows,
        )
        return
    cdef Plan plan = [
        expert_offsets.data, row_token.data, row_weights.data, token_rows.data, NULL, NULL, NULL
    ]
    _route(
        space, config, logits, expert_bias, valid_mask, capacity, topk_idx, topk_weights, tokens_per_expert,
        losses, sums, plan,
    )


cdef int _route(
    Space space, config, Array logits, Array expert_bias, Array valid_mask, int64_t capacity,
    Array topk_idx, Array topk_weights, Array tokens_per_expert, Array losses, Array totals, Plan plan,
) except -1:
    """Choice, weights, counts and losses; and the plan, if it has somewhere to go."""
    cdef int width = itemsize(logits.dtype), per_lane = _per_lane(logits.dtype, logits.dims[1])
    cdef int lane_bytes = per_lane * width
    cdef int warps = 32 if lane_bytes <= 16 else 16 if lane_bytes <= 32 else 8
    cdef tuple defines = _DEFINES[logits.dtype, per_lane]
    cdef Router router = _router(config, logits.dims[0])
    cdef char* bias = expert_bias.data if expert_bias is not None else NULL
    cdef char* mask = valid_mask.data if valid_mask is not None else NULL
    cdef Parameter[9] few_params
    if (
        router.num_tokens <= FEW_TOKENS * warps and router.top_k <= 32 and router.num_tokens * router.top_k <= FEW
        and router.aux_coeff == 0 and router.z_coeff == 0 and totals is None and capacity < 0
    ):
        few_params = [
            &router, &logits.data, &bias, &mask, &topk_idx.data, &topk_weights.data, &tokens_per_expert.data,
            &losses.data, &plan,
        ]
        kernel("routing.cu", "route_few", defines, space.device_id, 0).launch(
            1, 1, 1, 32 * warps, 0, space.stream, few_params
        )
        return 0
    cdef Slots slots = in_chunks(router.num_tokens, router.top_k, router.num_experts, capacity, warps)
    cdef int64_t entries = <int64_t>slots.chunks * router.num_experts
    cdef Array scratch = space.empty((width * (entries + 2 * slots.chunks) + 4 * entries,), UINT8)
    cdef Sums sums
    sums.scores = scratch.data
    sums.losses = scratch.data + width * entries
    sums.counts = scratch.data + width * (entries + 2 * slots.chunks)
    sums.tokens_per_expert = tokens_per_expert.data
    sums.results = losses.data
    sums.totals = totals.data if totals is not None else NULL
    cdef bint planned = plan.expert_offsets != NULL  # the others may be empty

    cdef Parameter[8] params = [
        &router, &slots, &logits.data, &bias, &mask, &topk_idx.data, &topk_weights.data, &sums
    ]
    # for every warp's scores
    cdef unsigned int smem = <unsigned int>(warps * width * router.num_experts)
    kernel("routing.cu", "route", defines, space.device_id, MOST_PLAN_BYTES).launch(
        slots.chunks, 1, 1, 32 * warps, smem, space.stream, params
    )
    cdef Parameter[6] plan_params = [
        &router, &slots, &topk_idx.data, &topk_weights.data, &sums, &plan
    ]
    kernel("routing.cu", "route_plan", defines, space.device_id, MOST_PLAN_BYTES).launch(
        slots.chunks + 1 if planned else 1, 1, 1, PLAN_THREADS,
        place_bytes(PLAN_THREADS // 32, router.num_experts, width) if planned else 0, space.stream, plan_params,
    )
    return 0


def router_losses(Space space, config, Array sums, Array tokens_per_expert, Array losses):
    cdef Router router = _router(config, 0)
    cdef tuple defines = _DEFINES[losses.dtype, _per_lane(losses.dtype, router.num_experts)]
    cdef Parameter[4] params = [&router, &sums.data, &tokens_per_expert.data, &losses.data]
    kernel("routing.cu", "router_losses", defines, space.device_id, 0).launch(
        1, 1, 1, 32, 0, space.stream, params
    )


def route_backward(
    Space space, config, Array logits, Array topk_idx, Array topk_weights, Array tokens_per_expert,
    Array token_rows, Array dp_rows, Array grad_losses, Array dlogits,
):
    cdef Router router = _router(config, dlogits.dims[0])
    if router.num_tokens == 0:
        return
    cdef char* given_logits = logits.data if logits is not None else NULL
    cdef char* d_losses = grad_losses.data if grad_losses is not None else NULL
    cdef int64_t num_rows = dp_rows.dims[0], blocks
    cdef tuple defines = _DEFINES[dlogits.dtype, _per_lane(dlogits.dtype, router.num_experts)]
    cdef int log_span = 0
    cdef Parameter[9] chosen_params
    cdef Parameter[10] params
    if config.sparse_gradient:
        while 1 << log_span < min(router.top_k, 32):
            log_span += 1
        blocks = divided_up(router.num_tokens, <int64_t>BACKWARD_WARPS * (32 >> log_span))
        chosen_params = [
            &router, &given_logits, &topk_idx.data, &topk_weights.data, &token_rows.data, &dp_rows.data, &num_rows,
            &log_span, &dlogits.data,
        ]
        kernel("routing.cu", "route_backward_chosen", defines, space.device_id, 0).launch(
            <unsigned int>blocks, 1, 1, 32 * BACKWARD_WARPS, 0, space.stream, chosen_params,
        )
        return
    blocks = min(divided_up(router.num_tokens, BACKWARD_WARPS), <int64_t>BACKWARD_BLOCKS)
    params = [
        &router, &given_logits, &topk_idx.data, &topk_weights.data, &tokens_per_expert.data, &token_rows.data,
        &dp_rows.data, &num_rows, &d_losses, &dlogits.data,
    ]
    kernel("routing.cu", "route_backward", defines, space.device_id, 0).launch(
        <unsigned int>blocks, 1, 1, 32 * BACKWARD_WARPS, 0, space.stream, params
    )
