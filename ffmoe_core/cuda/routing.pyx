"""The router's kernels: grids, scratch and arguments. The mathematics is in kernels/routing.cu."""

from libc.stdint cimport int32_t, int64_t

from ..arrays cimport FLOAT32, FLOAT64, UINT8, Array, Space, itemsize
from .dense_gemm cimport dense_gemm
from .launch cimport Parameter, kernel

cdef enum:
    WARPS = 8  # tokens a block works on at a time
    MOST_BLOCKS = 512  # their sums are added up by a second kernel, which has a thread for each
    FINISH_THREADS = 1024
    FINISH_EXPERTS = 32  # experts whose sums a block adds up

# The experts a lane can hold: any number up to 32 fits the last, fewer are faster.
cdef tuple _PER_LANE = (1, 2, 4, 8, 16, 32)
cdef tuple _PER_LANE_FLOAT64 = (4, 32)
cdef dict _DEFINES = {
    (dtype, per_lane): (f"W_TYPE={dtype}", f"EXPERTS_PER_LANE={per_lane}")
    for dtype, choices in ((<int>FLOAT32, _PER_LANE), (<int>FLOAT64, _PER_LANE_FLOAT64))
    for per_lane in choices
}


def variants():
    """Every (file, entry, defines) that these stages can launch."""
    return [
        ("routing.cu", entry, defines)
        for defines in _DEFINES.values()
        for entry in ("route", "route_finish", "route_backward")
    ]


cdef tuple _defines(Array logits):
    for per_lane in _PER_LANE_FLOAT64 if logits.dtype == FLOAT64 else _PER_LANE:
        if 32 * per_lane >= logits.dims[1]:
            break
    return _DEFINES[logits.dtype, per_lane]


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


cdef Router _router(config, Array logits, Array topk_idx):
    cdef Router out
    out.num_tokens = logits.dims[0]
    out.num_experts = <int32_t>logits.dims[1]
    out.top_k = <int32_t>topk_idx.dims[1]
    out.num_groups = config.num_expert_groups or 0
    out.topk_groups = config.topk_groups or 0
    out.sigmoid = config.gating == "sigmoid"
    out.normalise = config.norm_topk_prob
    out.scale = config.routed_scaling_factor
    out.aux_coeff = config.aux_loss_coeff
    out.z_coeff = config.z_loss_coeff
    return out


cdef unsigned int _blocks(int64_t num_tokens) noexcept:
    return <unsigned int>max(1, min(<int64_t>MOST_BLOCKS, (num_tokens + WARPS - 1) // WARPS))


def gate_logits(Space space, Array x, Array gate_weight, Array logits):
    dense_gemm(space, x, gate_weight, logits, False, True, False)


def gate_backward(
    Space space, Array dlogits, Array x, Array gate_weight, Array dx, Array dgate_weight, bint accumulate
):
    dense_gemm(space, dlogits, gate_weight, dx, False, False, accumulate)
    dense_gemm(space, dlogits, x, dgate_weight, True, False, False)


def route(
    Space space, config, Array logits, Array expert_bias, Array valid_mask,
    Array topk_idx, Array topk_weights, Array tokens_per_expert, Array losses,
):
    cdef tuple defines = _defines(logits)
    cdef Router router = _router(config, logits, topk_idx)
    cdef unsigned int blocks = _blocks(router.num_tokens)
    cdef int32_t block_count = <int32_t>blocks
    cdef int64_t E = router.num_experts, width = itemsize(logits.dtype)
    # the blocks' sums, then the experts'
    cdef int64_t score_sums_at = 8 * E
    cdef int64_t loss_sums_at = score_sums_at + width * blocks * E
    cdef int64_t counts_at = loss_sums_at + width * 2 * blocks
    cdef int64_t arrived_at = counts_at + 4 * blocks * E
    cdef Array scratch = space.empty((arrived_at + 4,), UINT8)
    cdef char* expert_scores = scratch.data
    cdef char* score_sums = scratch.data + score_sums_at
    cdef char* loss_sums = scratch.data + loss_sums_at
    cdef char* counts = scratch.data + counts_at
    cdef char* arrived = scratch.data + arrived_at
    cdef char* bias = expert_bias.data if expert_bias is not None else NULL
    cdef char* mask = valid_mask.data if valid_mask is not None else NULL

    cdef Parameter[10] params = [
        &router, &logits.data, &bias, &mask, &topk_idx.data, &topk_weights.data,
        &score_sums, &counts, &loss_sums, &arrived,
    ]
    kernel("routing.cu", "route", defines, space.device_id, 0).launch(
        blocks, 1, 1, 32 * WARPS, 0, space.stream, params
    )
    params = [
        &router, &score_sums, &counts, &loss_sums, &block_count,
        &expert_scores, &tokens_per_expert.data, &losses.data, &arrived, NULL,
    ]
    kernel("routing.cu", "route_finish", defines, space.device_id, 0).launch(
        <unsigned int>((E + FINISH_EXPERTS - 1) // FINISH_EXPERTS), 1, 1, FINISH_THREADS, 0,
        space.stream, params,
    )


def route_backward(
    Space space, config, Array logits, Array topk_idx, Array topk_weights, Array tokens_per_expert,
    Array token_rows, Array dp_rows, Array grad_losses, Array dlogits,
):
    cdef Router router = _router(config, logits, topk_idx)
    if router.num_tokens == 0:
        return
    cdef char* d_losses = grad_losses.data if grad_losses is not None else NULL
    cdef Parameter[8] params = [
        &router, &logits.data, &topk_idx.data, &tokens_per_expert.data, &token_rows.data, &dp_rows.data,
        &d_losses, &dlogits.data,
    ]
    kernel("routing.cu", "route_backward", _defines(logits), space.device_id, 0).launch(
        _blocks(router.num_tokens), 1, 1, 32 * WARPS, 0, space.stream, params
    )
