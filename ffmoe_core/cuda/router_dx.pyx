"""dx of a layer whose logits have gradients at the chosen experts alone (kernels/router_dx.cu)."""

from libc.stdint cimport int32_t, int64_t, uint32_t

from ..arrays cimport BFLOAT16, FLOAT16, FLOAT32, Array, Space
from .grouped_gemm cimport address, divided_up
from .launch cimport Parameter, kernel, multiprocessor_count

cdef enum:
    WIDTH = 8                 # columns of a thread, of 16 bits
    VECTOR_BYTES = 16
    THREADS = 256
    MOST_LANES = 32           # that share a slice: fewer where there are many experts
    MOST_SLICE_BYTES = 49152  # so that four blocks find room on a multiprocessor
    MOST_TOKENS = 128         # of a block, which share its slice
    BLOCKS = 8                # a multiprocessor, before they get more tokens each

# by type, then by the tokens that a thread sums up at a time
cdef dict _DEFINES = {
    dtype: {tokens: (f"X_TYPE={dtype}", f"TOKENS={tokens}") for tokens in (1, 2, 4)}
    for dtype in (<int>BFLOAT16, <int>FLOAT16)
}


def variants():
    """Every (file, entry, defines) that this module can launch."""
    return [
        ("router_dx.cu", "router_dx", defines) for of_dtype in _DEFINES.values() for defines in of_dtype.values()
    ]


cdef bint serves(Array d_chosen, Array gate, Array rows, Array dx) except -1:
    """Whether this can be done here."""
    return (
        dx.dtype in _DEFINES
        and gate.dtype == dx.dtype
        and d_chosen.dtype == FLOAT32
        and dx.dims[1] % WIDTH == 0
        and (address(gate) | address(rows) | address(dx)) % VECTOR_BYTES == 0
        and gate.dims[0] * VECTOR_BYTES <= MOST_SLICE_BYTES
    )


cdef int router_dx(
    Space space, Array d_chosen, Array topk_idx, Array gate, Array rows, Array token_rows, Array dx
) except -1:
    """dx [T, H] from d_chosen [T, K], the gradients of the logits at topk_idx [T, K], where ``serves`` says so."""
    cdef int64_t num_tokens = dx.dims[0]
    cdef int32_t columns = <int32_t>dx.dims[1], num_rows = <int32_t>rows.dims[0], num_experts = <int32_t>gate.dims[0]
    cdef int32_t rows_a_token = <int32_t>token_rows.dims[1], top_k = <int32_t>topk_idx.dims[1]
    if num_tokens == 0 or columns == 0:
        return 0
    cdef int32_t log_lanes = 0, lane_bytes = VECTOR_BYTES * num_experts
    while (
        1 << log_lanes < min(MOST_LANES, columns // WIDTH) and lane_bytes << (log_lanes + 1) <= MOST_SLICE_BYTES
    ):
        log_lanes += 1
    cdef uint32_t slices = <uint32_t>divided_up(columns, WIDTH << log_lanes)
    # so that eight vectors of rows are on their way to a thread
    cdef int tokens = 1 if rows_a_token > 4 else 2 if rows_a_token > 2 else 4
    cdef int64_t fewest = tokens * (THREADS >> log_lanes), blocks = BLOCKS * multiprocessor_count(space.device_id)
    cdef int32_t block_tokens = <int32_t>(
        fewest * max(min(divided_up(num_tokens * slices, blocks), <int64_t>MOST_TOKENS) // fewest, 1)
    )
    cdef Parameter[15] params = [
        &rows.data, &token_rows.data, &d_chosen.data, &topk_idx.data, &gate.data, &dx.data, &num_tokens, &num_rows,
        &num_experts, &rows_a_token, &top_k, &columns, &log_lanes, &slices, &block_tokens,
    ]
    return kernel("router_dx.cu", "router_dx", _DEFINES[dx.dtype][tokens], space.device_id, 0).launch(
        <unsigned int>(divided_up(num_tokens, block_tokens) * slices), 1, 1, THREADS,
        <unsigned int>(lane_bytes << log_lanes), space.stream, params,
    )
