"""Launches of the counting sort (kernels/sort.cu), the gather and the gather-and-sum (kernels/permute.cu)."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uintptr_t

from ..arrays cimport BFLOAT16, FLOAT16, FLOAT32, FLOAT64, UINT8, Array, Space, itemsize
from .launch cimport Parameter, kernel
from .placement cimport Plan, Slots, in_chunks, place_bytes

cdef enum:
    VECTOR_BYTES = 16
    THREADS = 256
    COPIES = 4  # vectors a thread of `permute` copies
    SORT_THREADS = 1024
    SORT_SLOTS = 2048  # least slots worth a block of its own
    SELECT_THREADS = 512
    MOST_SORT_BYTES = 65536  # of shared memory, for the most experts

cdef list _SORT_DEFINES = [(f"W_TYPE={dtype}",) for dtype in (<int>FLOAT32, <int>FLOAT64)]
# by dtype, then whether a vector is 16 bytes or one element
cdef list _ROW_DEFINES = [
    [(f"X_TYPE={dtype}", f"WIDTH={width}") for width in (1, VECTOR_BYTES // itemsize(dtype))]
    for dtype in (<int>FLOAT32, <int>FLOAT64, <int>BFLOAT16, <int>FLOAT16)
]
# by sums of a thread
cdef dict _SUM_DEFINES = {
    sums: [[(*defines, f"SUMS={sums}") for defines in of_dtype] for of_dtype in _ROW_DEFINES] for sums in (1, 2, 4)
}


def variants():
    """Every (file, entry, defines) that these stages can launch."""
    sorts = [
        ("sort.cu", entry, defines)
        for defines in _SORT_DEFINES
        for entry in ("sort_count", "sort_place", "sort_select")
    ]
    moves = [
        ("permute.cu", entry, defines)
        for entry, tables in (("permute", [_ROW_DEFINES]), ("combine", _SUM_DEFINES.values()))
        for table in tables
        for of_dtype in table
        for defines in of_dtype
    ]
    return sorts + moves


def sort(
    Space space, Array topk_idx, Array topk_weights, capacity, str drop_policy,
    Array expert_offsets, Array row_token, Array row_weights, Array token_rows,
):
    cdef tuple defines = _SORT_DEFINES[1 if topk_weights.dtype == FLOAT64 else 0]
    cdef int32_t top_k = <int32_t>topk_idx.dims[1], E = <int32_t>(expert_offsets.dims[0] - 1)
    cdef bint heaviest = drop_policy == "probs" and capacity >= 0
    cdef Slots slots = in_chunks(topk_idx.dims[0], top_k, E, capacity, max(1, SORT_SLOTS // top_k))
    # counts, and what choosing the heaviest takes: keys, order and starts
    cdef int64_t order_at = slots.count * itemsize(topk_weights.dtype) if heaviest else 0
    cdef int64_t starts_at = order_at + (4 * slots.count if heaviest else 0)
    cdef int64_t counts_at = starts_at + (4 * (E + 1) if heaviest else 0)
    cdef Array scratch = space.empty((counts_at + 4 * E * slots.chunks,), UINT8)
    cdef char* counts = scratch.data + counts_at
    cdef int device = space.device_id
    cdef Plan plan
    plan.expert_offsets = expert_offsets.data
    plan.row_token = row_token.data
    plan.row_weights = row_weights.data
    plan.token_rows = token_rows.data
    plan.starts = scratch.data + starts_at if heaviest else NULL
    plan.order = scratch.data + order_at if heaviest else NULL
    plan.keys = scratch.data if heaviest else NULL

    cdef Parameter[3] count_params = [&slots, &topk_idx.data, &counts]
    kernel("sort.cu", "sort_count", defines, device, 0).launch(
        slots.chunks, 1, 1, SORT_THREADS, 0, space.stream, count_params
    )
    cdef Parameter[5] place_params = [&slots, &topk_idx.data, &topk_weights.data, &counts, &plan]
    kernel("sort.cu", "sort_place", defines, device, MOST_SORT_BYTES).launch(
        slots.chunks, 1, 1, SORT_THREADS, place_bytes(SORT_THREADS // 32, E, itemsize(topk_weights.dtype)),
        space.stream, place_params,
    )
    if not heaviest:
        return
    cdef Parameter[9] select_params = [
        &topk_weights.data, &top_k, &plan.starts, &plan.order, &plan.keys, &expert_offsets.data,
        &row_token.data, &row_weights.data, &token_rows.data,
    ]
    kernel("sort.cu", "sort_select", defines, device, 0).launch(
        E, 1, 1, SELECT_THREADS, 0, space.stream, select_params
    )


# How a row of vectors is spread over threads: `1 << log_lanes` share a segment of it.
cdef struct Spread:
    bint wide  # vectors of 16 bytes
    int32_t vectors  # in a row
    int32_t log_lanes
    uint32_t segments
    unsigned int blocks


cdef Spread _spread(
    Array source, Array target, int64_t num_rows, int vectors_per_thread, const char* also=NULL
) noexcept:
    cdef Spread out
    cdef int64_t width = source.dims[1], in_vector = VECTOR_BYTES // itemsize(source.dtype), per_segment
    cdef uintptr_t addresses = <uintptr_t>source.data | <uintptr_t>target.data | <uintptr_t>also
    out.wide = width % in_vector == 0 and not addresses % VECTOR_BYTES
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


def combine(Space space, Array rows, Array token_rows, Array weights, Array out, Array added=None):
    cdef int64_t num_tokens = out.dims[0], num_rows = rows.dims[0]
    if num_tokens == 0:
        return
    cdef int32_t top_k = <int32_t>token_rows.dims[1]
    cdef int sums = 1 if top_k > 4 else 2 if top_k > 2 else 4  # so that eight vectors are on their way to a thread
    cdef char* w = weights.data if weights is not None else NULL
    cdef char* first = added.data if added is not None else NULL
    cdef Spread spread = _spread(rows, out, num_tokens, sums, first)
    cdef Parameter[11] params = [
        &rows.data, &token_rows.data, &w, &first, &out.data, &num_tokens, &num_rows, &top_k,
        &spread.vectors, &spread.log_lanes, &spread.segments,
    ]
    kernel("permute.cu", "combine", _SUM_DEFINES[sums][rows.dtype][spread.wide], space.device_id, 0).launch(
        spread.blocks, 1, 1, THREADS, 0, space.stream, params
    )
