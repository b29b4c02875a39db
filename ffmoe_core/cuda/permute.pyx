"""Launches of the counting sort (kernels/sort.cu), the gather and the gather-and-sum (kernels/permute.cu)."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uintptr_t

from ..arrays cimport BFLOAT16, FLOAT16, FLOAT32, FLOAT64, UINT8, Array, Space, itemsize
from .launch cimport Parameter, kernel

cdef enum:
    VECTOR_BYTES = 16
    THREADS = 256
    COPIES = 4  # vectors a thread of `permute` copies
    SORT_CHUNK = 2048  # slots a block sorts
    SELECT_THREADS = 512
    NO_BOUND = 0x7fffffff

cdef list _SORT_DEFINES = [(f"W_TYPE={dtype}",) for dtype in (<int>FLOAT32, <int>FLOAT64)]
# by dtype, then whether a vector is 16 bytes or one element
cdef list _ROW_DEFINES = [
    [(f"X_TYPE={dtype}", f"WIDTH={width}") for width in (1, VECTOR_BYTES // itemsize(dtype))]
    for dtype in (<int>FLOAT32, <int>FLOAT64, <int>BFLOAT16, <int>FLOAT16)
]


def variants():
    """Every (file, entry, defines) that these stages can launch."""
    sorts = [
        ("sort.cu", entry, defines)
        for defines in _SORT_DEFINES
        for entry in ("sort_count", "sort_scan", "sort_place", "sort_select")
    ]
    moves = [
        ("permute.cu", entry, defines)
        for of_dtype in _ROW_DEFINES
        for defines in of_dtype
        for entry in ("permute", "combine")
    ]
    return sorts + moves


cdef int _count_chunks(
    Space space, tuple defines, Array topk_idx, int64_t slots, int32_t chunks, int32_t limit,
    Array expert_offsets, char* counts, char* sizes, char* starts, char* arrived,
) except -1:
    """Where each chunk's rows of each expert begin, expert_offsets and, unless it is NULL, starts."""
    cdef int32_t num_experts = <int32_t>(expert_offsets.dims[0] - 1)
    cdef Parameter[5] count_params = [&topk_idx.data, &slots, &num_experts, &counts, &arrived]
    kernel("sort.cu", "sort_count", defines, space.device_id, 0).launch(
        chunks, 1, 1, THREADS, 0, space.stream, count_params
    )
    cdef Parameter[8] scan_params = [
        &counts, &chunks, &num_experts, &limit, &sizes, &expert_offsets.data, &starts, &arrived
    ]
    kernel("sort.cu", "sort_scan", defines, space.device_id, 0).launch(
        num_experts, 1, 1, THREADS, 0, space.stream, scan_params
    )
    return 0


def sort(
    Space space, Array topk_idx, Array topk_weights, capacity, str drop_policy,
    Array expert_offsets, Array row_token, Array row_weights, Array token_rows,
):
    cdef tuple defines = _SORT_DEFINES[1 if topk_weights.dtype == FLOAT64 else 0]
    cdef int64_t slots = topk_idx.dims[0] * topk_idx.dims[1], E = expert_offsets.dims[0] - 1
    cdef int32_t top_k = <int32_t>topk_idx.dims[1], num_experts = <int32_t>E
    cdef int32_t limit = NO_BOUND if capacity < 0 else min(capacity, NO_BOUND)
    cdef bint heaviest = drop_policy == "probs" and capacity >= 0
    cdef int32_t chunks = <int32_t>max(1, (slots + SORT_CHUNK - 1) // SORT_CHUNK)
    # keys, order and starts are needed to choose the heaviest only; counts and sizes between chunks only
    cdef int64_t order_at = slots * itemsize(topk_weights.dtype) if heaviest else 0
    cdef int64_t starts_at = order_at + (4 * slots if heaviest else 0)
    cdef int64_t counts_at = starts_at + (4 * (E + 1) if heaviest else 0)
    cdef int64_t sizes_at = counts_at + (4 * E * chunks if chunks > 1 else 0)
    cdef int64_t arrived_at = sizes_at + (4 * E if chunks > 1 else 0)
    cdef Array scratch = space.empty((arrived_at + 4,), UINT8) if heaviest or chunks > 1 else None
    cdef char* base = scratch.data if scratch is not None else NULL
    cdef char* keys = base if heaviest else NULL
    cdef char* order = base + order_at if heaviest else NULL
    cdef char* starts = base + starts_at if heaviest else NULL
    cdef char* counts = base + counts_at if chunks > 1 else NULL
    cdef char* sizes = base + sizes_at
    cdef char* arrived = base + arrived_at
    cdef int device = space.device_id
    if chunks > 1:
        _count_chunks(
            space, defines, topk_idx, slots, chunks, limit, expert_offsets, counts, sizes, starts, arrived
        )
    cdef Parameter[14] place_params = [
        &topk_idx.data, &topk_weights.data, &slots, &top_k, &num_experts, &limit, &counts,
        &expert_offsets.data, &row_token.data, &row_weights.data, &token_rows.data,
        &starts, &order, &keys,
    ]
    kernel("sort.cu", "sort_place", defines, device, 0).launch(
        chunks, 1, 1, THREADS, 0, space.stream, place_params
    )
    if not heaviest:
        return
    cdef Parameter[9] select_params = [
        &topk_weights.data, &top_k, &starts, &order, &keys, &expert_offsets.data,
        &row_token.data, &row_weights.data, &token_rows.data,
    ]
    kernel("sort.cu", "sort_select", defines, device, 0).launch(
        num_experts, 1, 1, SELECT_THREADS, 0, space.stream, select_params
    )


# How a row of vectors is spread over threads: `1 << log_lanes` share a segment of it.
cdef struct Spread:
    bint wide  # vectors of 16 bytes
    int32_t vectors  # in a row
    int32_t log_lanes
    uint32_t segments
    unsigned int blocks


cdef Spread _spread(Array source, Array target, int64_t num_rows, int vectors_per_thread) noexcept:
    cdef Spread out
    cdef int64_t width = source.dims[1], in_vector = VECTOR_BYTES // itemsize(source.dtype), per_segment
    out.wide = width % in_vector == 0 and not (<uintptr_t>source.data | <uintptr_t>target.data) % VECTOR_BYTES
    out.vectors = <int32_t>(width // in_vector if out.wide else width)
    out.log_lanes = 0
    while out.log_lanes < 5 and (1 << out.log_lanes) < out.vectors:
        out.log_lanes += 1
    per_segment = vectors_per_thread << out.log_lanes
    out.segments = <uint32_t>((out.vectors + per_segment - 1) // per_segment)
    out.blocks = <unsigned int>(((num_rows * out.segments << out.log_lanes) + THREADS - 1) // THREADS)
    return out


def permute(Space space, Array x, Array row_token, Array expert_offsets, Array out):
    cdef int64_t num_tokens = x.dims[0], num_rows = out.dims[0]
    if num_rows == 0:
        return
    cdef Spread spread = _spread(x, out, num_rows, COPIES)
    cdef char* num_kept = expert_offsets.data + 4 * (expert_offsets.dims[0] - 1)
    cdef Parameter[9] params = [
        &x.data, &row_token.data, &num_kept, &out.data, &num_tokens, &num_rows,
        &spread.vectors, &spread.log_lanes, &spread.segments,
    ]
    kernel("permute.cu", "permute", _ROW_DEFINES[x.dtype][spread.wide], space.device_id, 0).launch(
        spread.blocks, 1, 1, THREADS, 0, space.stream, params
    )


def combine(Space space, Array rows, Array token_rows, Array weights, Array out):
    cdef int64_t num_tokens = out.dims[0], num_rows = rows.dims[0]
    if num_tokens == 0:
        return
    cdef int32_t top_k = <int32_t>token_rows.dims[1]
    cdef Spread spread = _spread(rows, out, num_tokens, 1)
    cdef char* w = weights.data if weights is not None else NULL
    cdef Parameter[10] params = [
        &rows.data, &token_rows.data, &w, &out.data, &num_tokens, &num_rows, &top_k,
        &spread.vectors, &spread.log_lanes, &spread.segments,
    ]
    kernel("permute.cu", "combine", _ROW_DEFINES[rows.dtype][spread.wide], space.device_id, 0).launch(
        spread.blocks, 1, 1, THREADS, 0, space.stream, params
    )
