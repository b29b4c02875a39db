"""Grouped products on an NVIDIA GPU: which kernel, which tiles, which arguments.

16-bit matrices whose widths divide by 8 go to the tensor cores (grouped_gemm_sm80.cu), all others to
grouped_gemm_simt.cu. The host never knows how many rows a group has: grids are upper bounds, and blocks find
their tile from ``expert_offsets`` on the device.
"""

from libc.stdint cimport int64_t, uintptr_t

from ..arrays cimport BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Array, Space
from .launch cimport Kernel, Parameter, kernel, multiprocessor_count

cdef str TENSOR = "grouped_gemm_sm80.cu"
cdef str SIMT = "grouped_gemm_simt.cu"

cdef enum:
    TENSOR_TILE = 128
    TENSOR_THREADS = 256
    TENSOR_SMEM = 3 * 2 * 128 * 64 * 2
    SIMT_TILE = 64
    SIMT_THREADS = 256
    SPLIT_DEPTH = 256  # least contraction worth a block of its own

cdef dict ACTIVATIONS = {"swiglu": 0, "geglu": 1, "relu_squared": 2}
cdef tuple TENSOR_TYPES = (<int>BFLOAT16, <int>FLOAT16)
cdef tuple ALL_TYPES = (<int>FLOAT32, <int>FLOAT64, <int>BFLOAT16, <int>FLOAT16)


# --- variants: what each kernel is compiled with ---

cdef Kernel tensor_gemm(int x, int out, bint transpose_b, int device):
    return kernel(TENSOR, "grouped_gemm", _tensor_gemm[x, out, transpose_b], device, TENSOR_SMEM)


def _defined(**values):
    return tuple(f"{name}={value}" for name, value in values.items())


cdef dict _tensor_gemm = {
    (x, out, transpose_b): _defined(X_TYPE=x, OUT_TYPE=out, TRANSPOSE_B=transpose_b)
    for x in TENSOR_TYPES
    for out, transpose_b in ((x, 0), (x, 1), (<int>FLOAT32, 1))
}
cdef dict _tensor_wgrad = {x: _defined(X_TYPE=x, WGRAD=1) for x in TENSOR_TYPES}
cdef dict _tensor_glu = {
    (x, act): _defined(X_TYPE=x, GLU=1, ACTIVATION=act) for x in TENSOR_TYPES for act in ACTIVATIONS.values()
}
cdef dict _simt_gemm = {
    (x, transpose_b): _defined(A_TYPE=x, B_TYPE=x, OUT_TYPE=x, GEMM=1, TRANSPOSE_B=transpose_b)
    for x in ALL_TYPES
    for transpose_b in (0, 1)
}
cdef dict _simt_wgrad = {x: _defined(A_TYPE=x, B_TYPE=x, OUT_TYPE=x, WGRAD=1) for x in ALL_TYPES}
cdef dict _simt_glu = {
    (x, act): _defined(A_TYPE=x, B_TYPE=x, OUT_TYPE=x, GLU=1, ACTIVATION=act)
    for x in ALL_TYPES
    for act in ACTIVATIONS.values()
}
# The router's three products, for X and gate in X or float32: logits, dx, d_gate_weight.
cdef dict _dense = {
    (a, b, out, transpose_a, transpose_b): _defined(
        A_TYPE=a, B_TYPE=b, OUT_TYPE=out, DENSE=1, TRANSPOSE_A=transpose_a, TRANSPOSE_B=transpose_b
    )
    for x in ALL_TYPES
    for w in ((<int>FLOAT64,) if x == FLOAT64 else (<int>FLOAT32,))
    for gate in (x, w)
    for a, b, out, transpose_a, transpose_b in ((x, gate, w, 0, 1), (w, gate, x, 0, 0), (w, x, gate, 1, 0))
}
cdef dict _sum_parts = {w: _dense[w, w, w, 0, 1] for w in (<int>FLOAT32, <int>FLOAT64)}


def variants():
    """Every (file, entry, defines) that this module can launch."""
    tensor = [("grouped_gemm", d) for d in _tensor_gemm.values()]
    tensor += [("grouped_gemm_wgrad", d) for d in _tensor_wgrad.values()]
    tensor += [(e, d) for d in _tensor_glu.values() for e in ("grouped_glu", "grouped_glu_backward")]
    simt = [("grouped_gemm", d) for d in _simt_gemm.values()]
    simt += [("grouped_gemm_wgrad", d) for d in _simt_wgrad.values()]
    simt += [(e, d) for d in _simt_glu.values() for e in ("grouped_glu", "grouped_glu_backward")]
    simt += [(e, d) for d in _dense.values() for e in ("dense_gemm", "sum_parts")]
    return [(TENSOR, e, d) for e, d in tensor] + [(SIMT, e, d) for e, d in simt]


# --- choosing and counting ---


cdef bint on_tensor_cores(Array a, Array b, Array c, int64_t width0, int64_t width1) noexcept:
    """16-bit, widths that divide by 8, and bases that 16-byte accesses can use."""
    return (
        (a.dtype == BFLOAT16 or a.dtype == FLOAT16)
        and a.dtype == b.dtype
        and width0 % 8 == 0
        and width1 % 8 == 0
        and (<uintptr_t>a.data | <uintptr_t>b.data | <uintptr_t>c.data) % 16 == 0
    )


cdef int64_t divided_up(int64_t value, int64_t by) noexcept:
    return (value + by - 1) // by


cdef int64_t row_tiles(int64_t num_rows, int64_t num_groups, int64_t tile) noexcept:
    """At most so many tiles do groups of num_rows rows in all make, the rows behind the last one included."""
    return num_rows // tile + min(num_groups + 1, num_rows)


cdef void* data_of(Array array) noexcept:
    return array.data if array is not None else NULL


# --- stages ---


def grouped_gemm(Space space, Array a, Array b, Array expert_offsets, Array row_index, bint transpose_b, Array out):
    cdef int num_groups = <int>b.dims[0], num_rows = <int>out.dims[0]
    cdef int depth = <int>a.dims[1], columns = <int>out.dims[1], column_tiles
    cdef bint tensor = on_tensor_cores(a, b, out, depth, columns)
    cdef int64_t tile = TENSOR_TILE if tensor else SIMT_TILE
    cdef void* index = data_of(row_index)
    cdef Kernel launched
    if num_rows == 0:
        return
    if tensor:
        launched = tensor_gemm(a.dtype, out.dtype, transpose_b, space.device_id)
    else:
        launched = kernel(SIMT, "grouped_gemm", _simt_gemm[a.dtype, transpose_b], space.device_id, 0)
    column_tiles = <int>divided_up(columns, tile)
    cdef Parameter[10] params = [
        &a.data, &b.data, &expert_offsets.data, &index, &out.data,
        &num_groups, &num_rows, &depth, &columns, &column_tiles,
    ]
    launched.launch(
        <unsigned int>(row_tiles(num_rows, num_groups, tile) * column_tiles), 1, 1,
        TENSOR_THREADS if tensor else SIMT_THREADS, TENSOR_SMEM if tensor else 0, space.stream, params,
    )


def grouped_gemm_wgrad(Space space, Array a, Array b, Array expert_offsets, Array a_index, Array b_index, Array out):
    cdef int a_columns = <int>out.dims[1], b_columns = <int>out.dims[2], column_tiles
    cdef bint tensor = on_tensor_cores(a, b, out, a_columns, b_columns)
    cdef int64_t tile = TENSOR_TILE if tensor else SIMT_TILE
    cdef void* left = data_of(a_index)
    cdef void* right = data_of(b_index)
    cdef Kernel launched
    if tensor:
        launched = kernel(TENSOR, "grouped_gemm_wgrad", _tensor_wgrad[a.dtype], space.device_id, TENSOR_SMEM)
    else:
        launched = kernel(SIMT, "grouped_gemm_wgrad", _simt_wgrad[a.dtype], space.device_id, 0)
    column_tiles = <int>divided_up(b_columns, tile)
    cdef Parameter[9] params = [
        &a.data, &b.data, &expert_offsets.data, &left, &right, &out.data, &a_columns, &b_columns, &column_tiles,
    ]
    launched.launch(
        <unsigned int>(divided_up(a_columns, tile) * column_tiles), <unsigned int>out.dims[0], 1,
        TENSOR_THREADS if tensor else SIMT_THREADS, TENSOR_SMEM if tensor else 0, space.stream, params,
    )


def grouped_glu(
    Space space, Array x, Array w_up, Array expert_offsets, Array row_index, str activation, Array z, Array a
):
    cdef int num_groups = <int>w_up.dims[0], num_rows = <int>a.dims[0]
    cdef int depth = <int>x.dims[1], intermediate = <int>a.dims[1], column_tiles
    cdef bint tensor = on_tensor_cores(x, w_up, a if z is None else z, depth, intermediate) and (
        <uintptr_t>a.data % 16 == 0
    )
    cdef int64_t tile = TENSOR_TILE if tensor else SIMT_TILE
    cdef void* index = data_of(row_index)
    cdef void* kept = data_of(z)
    cdef Kernel launched
    if num_rows == 0:
        return
    key = x.dtype, ACTIVATIONS[activation]
    if tensor:
        launched = kernel(TENSOR, "grouped_glu", _tensor_glu[key], space.device_id, TENSOR_SMEM)
    else:
        launched = kernel(SIMT, "grouped_glu", _simt_glu[key], space.device_id, 0)
    column_tiles = <int>divided_up(intermediate, tile // 2)
    cdef Parameter[11] params = [
        &x.data, &w_up.data, &expert_offsets.data, &index, &kept, &a.data,
        &num_groups, &num_rows, &depth, &intermediate, &column_tiles,
    ]
    launched.launch(
        <unsigned int>(row_tiles(num_rows, num_groups, tile) * column_tiles), 1, 1,
        TENSOR_THREADS if tensor else SIMT_THREADS, TENSOR_SMEM if tensor else 0, space.stream, params,
    )


def grouped_glu_backward(
    Space space, Array dout, Array w_down, Array expert_offsets, Array row_index, Array row_weights,
    Array z, str activation, Array dz, Array pa, Array dp_rows,
):
    cdef int num_groups = <int>w_down.dims[0], num_rows = <int>pa.dims[0]
    cdef int depth = <int>dout.dims[1], intermediate = <int>pa.dims[1], column_tiles
    cdef bint tensor = on_tensor_cores(dout, w_down, z, depth, intermediate) and (
        (<uintptr_t>dz.data | <uintptr_t>pa.data) % 16 == 0
    )
    cdef int64_t tile = TENSOR_TILE if tensor else SIMT_TILE
    cdef void* index = data_of(row_index)
    cdef Kernel launched
    if num_rows == 0:
        return
    key = dout.dtype, ACTIVATIONS[activation]
    if tensor:
        launched = kernel(TENSOR, "grouped_glu_backward", _tensor_glu[key], space.device_id, TENSOR_SMEM)
    else:
        launched = kernel(SIMT, "grouped_glu_backward", _simt_glu[key], space.device_id, 0)
    column_tiles = <int>divided_up(intermediate, tile)
    # each column tile has a part of every row's dot product; they are added in order
    cdef Array parts = dp_rows if column_tiles == 1 else space.empty((column_tiles, num_rows), dp_rows.dtype)
    cdef Parameter[14] params = [
        &dout.data, &w_down.data, &expert_offsets.data, &index, &row_weights.data, &z.data, &dz.data, &pa.data,
        &parts.data, &num_groups, &num_rows, &depth, &intermediate, &column_tiles,
    ]
    launched.launch(
        <unsigned int>(row_tiles(num_rows, num_groups, tile) * column_tiles), 1, 1,
        TENSOR_THREADS if tensor else SIMT_THREADS, TENSOR_SMEM if tensor else 0, space.stream, params,
    )
    if column_tiles > 1:
        sum_parts(space, _sum_parts[dp_rows.dtype], parts, dp_rows, column_tiles, False)


cdef int sum_parts(Space space, tuple defines, Array parts, Array out, int count, bint accumulate) except -1:
    cdef int64_t size = out.size
    cdef int added = accumulate
    cdef Parameter[5] params = [&parts.data, &out.data, &size, &count, &added]
    cdef int64_t blocks = min(divided_up(size, 256), 8 * multiprocessor_count(space.device_id))
    kernel(SIMT, "sum_parts", defines, space.device_id, 0).launch(
        <unsigned int>blocks, 1, 1, 256, 0, space.stream, params
    )
    return 0


cdef int one_group(Space space, Array a, Array b, Array out) except -1:
    """out[m, n] = sum_k a[m, k] b[n, k] on the tensor cores: all rows are one group."""
    cdef int num_groups = 1, rows = <int>out.dims[0], depth = <int>a.dims[1], columns = <int>out.dims[1]
    cdef int column_tiles = <int>divided_up(columns, TENSOR_TILE)
    cdef void* nothing = NULL
    cdef Parameter[10] params = [
        &a.data, &b.data, &nothing, &nothing, &out.data, &num_groups, &rows, &depth, &columns, &column_tiles,
    ]
    return tensor_gemm(a.dtype, out.dtype, True, space.device_id).launch(
        <unsigned int>(divided_up(rows, TENSOR_TILE) * column_tiles), 1, 1,
        TENSOR_THREADS, TENSOR_SMEM, space.stream, params,
    )


cdef int dense_gemm(
    Space space, Array a, Array b, Array out, bint transpose_a, bint transpose_b, bint accumulate
) except -1:
    """out[m, n] (+)= sum_k a(m, k) b(k, n): a is [k, m] if transpose_a else [m, k]; b is [n, k] if transpose_b.

    For the router's products, whose types may differ.
    """
    cdef int rows = <int>out.dims[0], columns = <int>out.dims[1], depth = <int>a.dims[0 if transpose_a else 1]
    cdef int column_tiles, added = accumulate, split_depth, splits
    cdef void* nothing = NULL
    cdef int64_t tiles
    cdef Array parts = None
    if rows == 0 or columns == 0:
        return 0
    if (
        not transpose_a and transpose_b and not accumulate and out.dtype == FLOAT32
        and on_tensor_cores(a, b, out, depth, columns)
    ):
        return one_group(space, a, b, out)
    defines = _dense[a.dtype, b.dtype, out.dtype, transpose_a, transpose_b]
    column_tiles = <int>divided_up(columns, SIMT_TILE)
    tiles = divided_up(rows, SIMT_TILE) * column_tiles
    # a long contraction with few tiles is split until every multiprocessor has work
    splits = <int>max(1, min(2 * multiprocessor_count(space.device_id) // tiles, depth // SPLIT_DEPTH))
    split_depth = <int>divided_up(divided_up(depth, splits), 16) * 16
    splits = <int>max(1, divided_up(depth, split_depth)) if split_depth else 1
    if splits > 1:
        parts = space.empty((splits, rows, columns), FLOAT64 if out.dtype == FLOAT64 else FLOAT32)
        nothing = parts.data
    cdef Parameter[10] params = [
        &a.data, &b.data, &out.data, &nothing, &rows, &columns, &depth, &split_depth, &column_tiles, &added,
    ]
    kernel(SIMT, "dense_gemm", defines, space.device_id, 0).launch(
        <unsigned int>tiles, <unsigned int>splits, 1, SIMT_THREADS, 0, space.stream, params
    )
    if splits > 1:
        sum_parts(space, defines, parts, out, splits, accumulate)
    return 0
