"""The gradient by the gate's weight on Hopper, d_gate = d_logits^T x, as a weight gradient of the experts' kernels.

Those take 16-bit operands, so d_logits go in as two bfloat16 terms side by side: far below the rounding of a bfloat16
result. kernels/terms.cu makes them, also from the chosen experts' alone. And their contraction is a group of rows, so
the tokens are cut into equal groups until every multiprocessor has work; what the groups and the terms give is added up
in order.
"""

from libc.stdint cimport int64_t

from ..arrays cimport BFLOAT16, FLOAT32, INT32, Array, Space
from . cimport grouped_gemm_sm90 as sm90
from .grouped_gemm cimport address, divided_up, sum_parts
from .launch cimport Parameter, kernel, multiprocessor_count

cdef enum:
    TERMS = 2
    THREADS = 256
    TILE = 256            # rows and columns that a cluster of two blocks computes
    STEP = 64             # tokens that a part is a multiple of
    TILE_COST = 512       # what a tile costs beside its product, in tokens
    MOST_PARTS = 16
    FEWEST_TOKENS = 4096  # fewer are not worth three launches


# by the elements that a thread splits: a row has a whole number of threads
cdef dict _DEFINES = {width: (f"WIDTH={width}",) for width in (8, 4)}


def variants():
    """Every (file, entry, defines) that this module can launch."""
    return [
        ("terms.cu", entry, defines) for defines in _DEFINES.values() for entry in ("split_terms", "chosen_terms")
    ]


cdef bint serves(Space space, Array d_logits, Array x, Array d_gate) except -1:
    """Whether this can be done here, and is faster."""
    return (
        x.dims[0] >= FEWEST_TOKENS
        and d_logits.dtype == FLOAT32
        and d_gate.dtype == BFLOAT16
        and sm90.serves(
            x.dtype, address(d_logits) | address(x) | address(d_gate), TERMS * d_gate.dims[0] | x.dims[1], MOST_PARTS,
            space.device_id,
        )
    )


cdef int parts_of(int64_t num_tokens, int64_t tiles, int64_t clusters):
    """Into how many parts the tokens are cut that keep `clusters` busy with `tiles` each."""
    cdef int64_t cost, least = -1
    cdef int parts, best = 1
    for parts in range(1, MOST_PARTS + 1):
        cost = divided_up(parts * tiles, clusters) * (divided_up(num_tokens, parts) + TILE_COST)
        if least < 0 or cost < least:
            least = cost
            best = parts
    return best


cdef int gate_wgrad(Space space, Array d_logits, Array topk_idx, Array x, Array d_gate) except -1:
    """d_gate [E, H] bfloat16 = d_logits [T, E]^T x [T, H], where ``serves`` says so.

    With ``topk_idx`` [T, K] d_logits [T, K] are those of these experts, and of the others zero.
    """
    cdef int T = <int>x.dims[0], E = <int>d_gate.dims[0], top_k = <int>d_logits.dims[1]
    cdef int64_t H = x.dims[1]
    cdef int64_t tiles = divided_up(TERMS * E, TILE) * divided_up(H, TILE)
    cdef int parts = parts_of(T, tiles, multiprocessor_count(space.device_id) // 2)
    cdef int part_rows = <int>(divided_up(divided_up(T, parts), STEP) * STEP)
    cdef Array terms = space.empty((T, TERMS * E), BFLOAT16)
    cdef Array offsets = space.empty((parts + 1,), INT32)
    cdef Array sums = space.empty((parts, TERMS * E, H), FLOAT32)
    cdef int width = 8 if E % 8 == 0 else 4
    cdef int64_t pieces = E // width  # a thread's
    cdef Parameter[7] split_params = [
        &d_logits.data, &terms.data, &offsets.data, &T, &E, &parts, &part_rows
    ]
    cdef Parameter[9] chosen_params
    if topk_idx is None:
        kernel("terms.cu", "split_terms", _DEFINES[width], space.device_id, 0).launch(
            <unsigned int>divided_up(T * pieces, THREADS), 1, 1, THREADS, 0, space.stream, split_params
        )
    else:
        chosen_params = [
            &d_logits.data, &topk_idx.data, &terms.data, &offsets.data, &T, &E, &top_k, &parts, &part_rows
        ]
        kernel("terms.cu", "chosen_terms", _DEFINES[width], space.device_id, 0).launch(
            <unsigned int>divided_up(T, THREADS // pieces), 1, 1, THREADS, 0, space.stream, chosen_params
        )
    sm90.grouped_gemm_wgrad(space, terms, x, offsets, None, None, sums, False, 1)
    return sum_parts(space, sums, d_gate, TERMS * parts)
