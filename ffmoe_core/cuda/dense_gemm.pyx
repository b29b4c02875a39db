"""The router's products on an NVIDIA GPU: logits, their gradient by x, and by the gate's weight.

Matrices whose rows are whole pieces of 16 bytes go to the tensor cores (dense_gemm.cu), which are as exact as float32;
all others, and float64, to grouped_gemm_simt.cu.
"""

from libc.stdint cimport int64_t, uintptr_t

from ..arrays cimport BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Array, Space, itemsize
from .grouped_gemm cimport address, divided_up, in_vectors, sum_parts
from .launch cimport Parameter, kernel, multiprocessor_count

from .permute import combine

cdef enum:
    TILE = 128
    THREADS = 256
    SHARED_BYTES = 96 * 1024  # of dense_gemm.cu
    STEP = 64  # a part of the contraction is a multiple of
    # least contraction worth a block of its own, and adding it up: on a multiprocessor without one, and beside another
    SPLIT_DEPTH = 128
    SECOND_SPLIT_DEPTH = 512

cdef tuple ALL_TYPES = (<int>FLOAT32, <int>FLOAT64, <int>BFLOAT16, <int>FLOAT16)

# Products of X and the gate's weight, in X or float32.
cdef dict _defines = {
    (a, b, out, transpose_a, transpose_b): (
        f"A_TYPE={a}", f"B_TYPE={b}", f"OUT_TYPE={out}",
        f"TRANSPOSE_A={transpose_a}", f"TRANSPOSE_B={transpose_b}",
    )
    for x in ALL_TYPES
    for w in ((<int>FLOAT64,) if x == FLOAT64 else (<int>FLOAT32,))
    for gate in (x, w)
    for a, b, out, transpose_a, transpose_b in ((x, gate, w, 0, 1), (w, gate, x, 0, 0), (w, x, gate, 1, 0))
}
cdef dict _simt_defines = {key: ("DENSE=1", *defines) for key, defines in _defines.items()}


def variants():
    """Every (file, entry, defines) that this module can launch."""
    return [
        *(("dense_gemm.cu", "dense_gemm", defines) for key, defines in _defines.items() if FLOAT64 not in key[:3]),
        *(("grouped_gemm_simt.cu", "dense_gemm", defines) for defines in _simt_defines.values()),
    ]


cdef int dense_gemm(
    Space space, Array a, Array b, Array out, bint transpose_a, bint transpose_b,
    Array rows=None, Array token_rows=None,
) except -1:
    """out[m, n] = sum_k a(m, k) b(k, n): a is [k, m] if transpose_a, b is [n, k] if transpose_b.

    With ``rows``, which only a product without transposes takes, plus the sum over j of
    ``rows[token_rows[m, j], n]``. Types may differ: see ``_defines``.
    """
    cdef int num_rows = <int>out.dims[0], columns = <int>out.dims[1], depth = <int>a.dims[0 if transpose_a else 1]
    cdef int64_t width_a = a.dims[1], width_b = b.dims[1]
    cdef uintptr_t added = address(rows), names = address(token_rows)
    cdef uintptr_t addresses = address(a) | address(b) | address(out) | added
    cdef int num_added = 0, top_k = 0, accumulate = rows is not None
    cdef tuple key = (a.dtype, b.dtype, out.dtype, transpose_a, transpose_b)
    if num_rows == 0 or columns == 0:
        return 0
    cdef int column_tiles = <int>divided_up(columns, TILE)
    cdef int64_t tiles = divided_up(num_rows, TILE) * column_tiles
    cdef int64_t splits = 1, processors = multiprocessor_count(space.device_id)
    # a long contraction with few tiles is split until every multiprocessor has work
    if 2 * tiles <= processors and rows is None:
        splits = max(
            1, min(processors // tiles, depth // SPLIT_DEPTH), min(2 * processors // tiles, depth // SECOND_SPLIT_DEPTH)
        )
    cdef int split_depth = <int>(divided_up(divided_up(depth, splits), STEP) * STEP)
    cdef int count = <int>divided_up(depth, split_depth) if depth > 0 else 1
    cdef Array parts = None
    if count > 1:
        parts = space.empty((count, num_rows, columns), FLOAT64 if out.dtype == FLOAT64 else FLOAT32)
    cdef uintptr_t parts_at = address(parts)
    cdef int vectors = in_vectors(addresses | parts_at, width_a | width_b, columns)
    cdef bint tensor = (
        out.dtype != FLOAT64
        and (width_a * itemsize(a.dtype) | width_b * itemsize(b.dtype) | columns * itemsize(out.dtype)) % 16 == 0
        and (addresses | parts_at) % 16 == 0
    )
    if rows is not None:
        num_added = <int>rows.dims[0]
        top_k = <int>token_rows.dims[1]
        if not tensor:
            combine(space, rows, token_rows, None, out)
    # the last ones are of the kernels for tensor cores, and of SIMT
    cdef Parameter[13] params = [
        &a.data, &b.data, &out.data, &parts_at, &num_rows, &columns, &depth, &split_depth, &column_tiles,
        &added, &names, &top_k, &num_added,
    ]
    if not tensor:
        params[9] = &accumulate
        params[10] = &vectors
    cdef unsigned int shared = SHARED_BYTES if tensor else 0
    kernel(
        "dense_gemm.cu" if tensor else "grouped_gemm_simt.cu", "dense_gemm",
        (_defines if tensor else _simt_defines)[key], space.device_id, shared,
    ).launch(<unsigned int>tiles, count, 1, THREADS, shared, space.stream, params)
    if count > 1:
        sum_parts(space, parts, out, count)
    return 0
