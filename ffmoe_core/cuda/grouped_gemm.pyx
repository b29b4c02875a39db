"""Grouped products on an NVIDIA GPU: which kernel, which tiles, which arguments.

16-bit matrices whose widths divide by 8 go to the tensor cores (grouped_gemm_sm80.cu; few rows to
grouped_gemm_rows.cu), all others to grouped_gemm_simt.cu. The host never knows how many rows a group has: grids are
upper bounds, and blocks find their tile from ``expert_offsets`` on the device.
"""

from libc.math cimport log2
from libc.stdint cimport int64_t, uintptr_t

from ..arrays cimport BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Array, Space
from . cimport grouped_gemm_sm90 as sm90
from .launch cimport Kernel, Parameter, kernel, multiprocessor_count

from .tiles import Size, choices, choose, gpu_of

# How a product is computed: on the ordinary units, or on the tensor cores as Tiles of tiles.py says.
cdef enum:
    SIMT
    NARROW
    WIDE
    CLUSTER
    PACED
    TURNS
    PACED_TURNS
    ROWS

cdef tuple FILES = ("grouped_gemm_simt.cu", "grouped_gemm_sm80.cu", "grouped_gemm_sm80.cu")
cdef str ROWS_FILE = "grouped_gemm_rows.cu"
cdef int[3] TILE_COLUMNS = [128, 128, 256]
cdef unsigned int[3] THREADS = [256, 128, 256]
cdef unsigned int[3] SHARED_BYTES = [0, 4 * (128 + 128) * 64, 4 * (128 + 256) * 64]

cdef enum:
    TILE_ROWS = 128
    PART_COLUMNS = 64  # of a row's dot product in grouped_glu_backward
    SUM_THREADS = 256
    # the same as in kernels/grouped_gemm_rows.cu
    ROWS_TILES = 2
    ROWS_THREADS = 256

cdef dict ACTIVATIONS = {"swiglu": 0, "geglu": 1, "relu_squared": 2}
cdef tuple TENSOR_TYPES = (<int>BFLOAT16, <int>FLOAT16)
cdef tuple ALL_TYPES = (<int>FLOAT32, <int>FLOAT64, <int>BFLOAT16, <int>FLOAT16)


# --- variants: what each kernel is compiled with ---


def _typed(path, x, out):
    if path == SIMT:
        return f"A_TYPE={x}", f"B_TYPE={x}", f"OUT_TYPE={out}"
    return f"X_TYPE={x}", f"TILE_COLUMNS={TILE_COLUMNS[path]}"


cdef list PATHS = [(path, x) for path in range(3) for x in (ALL_TYPES if path == SIMT else TENSOR_TYPES)]
# by path, dtype and then the kernel's own choice
cdef dict _gemm = {
    (path, x, transpose_b): _typed(path, x, x)
    + (("GEMM=1",) if path == SIMT else ())
    + (f"TRANSPOSE_B={transpose_b}",)
    for path, x in PATHS
    for transpose_b in (0, 1)
}
# by path, dtype, dtype of the result and whether it is added to
cdef dict _wgrad = {
    (path, x, out, accumulate): _typed(path, x, out)
    + (() if path == SIMT else (f"OUT_TYPE={out}",))
    + ("WGRAD=1", f"ACCUMULATE={accumulate}")
    for path, x in PATHS
    for out in {x, <int>FLOAT64 if x == FLOAT64 else <int>FLOAT32}
    for accumulate in (0, 1)
}
cdef dict _glu = {
    (path, x, act): (*_typed(path, x, x), "GLU=1", *(() if path == SIMT else (f"ACTIVATION={act}",)))
    for path, x in PATHS
    for act in ACTIVATIONS.values()
}
cdef dict _glu_backward = {
    (path, x, act): (*_typed(path, x, x), "GLU_BACKWARD=1", *(() if path == SIMT else (f"ACTIVATION={act}",)))
    for path, x in PATHS
    for act in ACTIVATIONS.values()
    if path != WIDE
}
cdef dict _rows_gemm = {x: (f"X_TYPE={x}",) for x in TENSOR_TYPES}
cdef dict _rows_glu = {
    (x, act): (f"X_TYPE={x}", "GLU=1", f"ACTIVATION={act}") for x in TENSOR_TYPES for act in ACTIVATIONS.values()
}
cdef dict _sum = {
    x: (*_typed(SIMT, <int>FLOAT64 if x == FLOAT64 else <int>FLOAT32, x), "SUM=1") for x in ALL_TYPES
}


def variants():
    """Every (file, entry, defines) that this module can launch."""
    cdef dict table
    grouped = {
        (FILES[key[0]], entry, defines)
        for entry, table in (
            ("grouped_gemm", _gemm), ("grouped_gemm_wgrad", _wgrad),
            ("grouped_glu", _glu), ("grouped_glu_backward", _glu_backward),
        )
        for key, defines in table.items()
    }
    few = [
        (ROWS_FILE, entry, defines)
        for entry, table in (("grouped_gemm", _rows_gemm), ("grouped_glu", _rows_glu))
        for defines in table.values()
    ]
    return sorted(grouped) + few + [(FILES[SIMT], "sum_parts", defines) for defines in _sum.values()]


# --- choosing and counting ---


cdef uintptr_t address(Array array) noexcept:
    return <uintptr_t>array.data if array is not None else 0


cdef int64_t divided_up(int64_t value, int64_t by) noexcept:
    return (value + by - 1) // by


cdef int64_t row_tiles(int64_t num_rows, int64_t num_groups) noexcept:
    """At most so many tiles do groups of num_rows rows in all make, the rows behind the last one included."""
    return num_rows // TILE_ROWS + min(num_groups + 1, num_rows)


cdef int path_of(
    str product, int dtype, uintptr_t addresses, int64_t num_groups, int64_t num_rows, int64_t width, int64_t columns,
    int device, int gathered, int chunks,
) except -1:
    """How to compute a product; tiles.py says what its sizes are. ``addresses`` are or-ed together; an index names
    the rows of so many operands.

    The tensor cores take 16-bit elements, widths that divide by 8, and addresses that 16-byte accesses can use.
    """
    if not (dtype == BFLOAT16 or dtype == FLOAT16) or (width | columns) % 8 != 0 or addresses % 16 != 0:
        return SIMT
    cdef bint hopper = gathered < 2 and sm90.runs_on(device, num_groups), in_chunks = chunks > 1
    # in octaves, as it may be another number each time
    cdef int rows = <int>(log2(max(num_rows, 1)) + 0.5)
    key = product, device, hopper, gathered, in_chunks, num_groups, rows, width, columns
    path = choices.get(key)
    if path is None:
        size = Size(num_groups, 1 << rows, width, columns)
        gpu = gpu_of(device)._replace(hopper=hopper)
        path = choices[key] = choose(product, size, gpu, gathered > 0, in_chunks)
    return path


cdef int in_vectors(uintptr_t addresses, int64_t width0, int64_t width1) noexcept:
    """Whether SIMT kernels may move 4 elements at a time."""
    return (width0 | width1) % 4 == 0 and addresses % 16 == 0


cdef int launch_rows(
    Space space, str entry, tuple defines, int64_t num_rows, int64_t columns, void** params
) except -1:
    """The kernels for few rows, which take groups without chunks; ``columns`` of the weights' rows."""
    return kernel(ROWS_FILE, entry, defines, space.device_id, 0).launch(
        <unsigned int>divided_up(columns, 16 * ROWS_TILES), <unsigned int>num_rows, 1, ROWS_THREADS, 0, space.stream,
        params,
    )


cdef int launch(
    Space space, int path, str entry, tuple defines, int64_t grid_x, int64_t grid_y, void** params
) except -1:
    cdef Kernel chosen = kernel(FILES[path], entry, defines, space.device_id, SHARED_BYTES[path])
    return chosen.launch(
        <unsigned int>grid_x, <unsigned int>grid_y, 1, THREADS[path], SHARED_BYTES[path], space.stream, params
    )


# --- stages: the kernels of SIMT have more parameters, the last ones ---


def grouped_gemm(
    Space space, Array a, Array b, Array expert_offsets, Array row_index, bint transpose_b, Array out,
    int chunks=1, int chunk=0,
):
    cdef int num_groups = <int>b.dims[0], num_rows = <int>out.dims[0]
    cdef int depth = <int>a.dims[1], columns = <int>out.dims[1], column_tiles, vectors
    cdef uintptr_t index = address(row_index), addresses = address(a) | address(b) | address(out)
    cdef int64_t tiles_down = row_tiles(num_rows, num_groups)
    cdef int path
    if num_rows == 0:
        return
    path = path_of(
        "gemm_nk" if transpose_b else "gemm_kn", a.dtype, addresses, num_groups, num_rows, depth, columns,
        space.device_id, index != 0, chunks,
    )
    cdef Parameter[9] few
    if path == ROWS:
        few = [
            &a.data, &b.data, &expert_offsets.data, &index, &out.data, &num_groups, &num_rows, &depth, &columns,
        ]
        launch_rows(space, "grouped_gemm", _rows_gemm[a.dtype], num_rows, columns, few)
        return
    if path >= TURNS:
        sm90.grouped_gemm_in_turns(
            space, a, b, expert_offsets, transpose_b, out, path == PACED_TURNS, chunks, chunk
        )
        return
    if path >= CLUSTER:
        sm90.grouped_gemm(space, a, b, expert_offsets, row_index, transpose_b, out, path == PACED, chunks, chunk)
        return
    column_tiles = <int>divided_up(columns, TILE_COLUMNS[path])
    vectors = in_vectors(addresses, depth, columns)
    cdef Parameter[13] params = [
        &a.data, &b.data, &expert_offsets.data, &index, &out.data,
        &num_groups, &num_rows, &chunks, &chunk, &depth, &columns, &column_tiles, &vectors,
    ]
    launch(
        space, path, "grouped_gemm", _gemm[path, a.dtype, transpose_b], tiles_down * column_tiles, 1, params
    )


def grouped_gemm_wgrad(
    Space space, Array a, Array b, Array expert_offsets, Array a_index, Array b_index, Array out,
    bint accumulate, double scale=1.0, int chunks=1,
):
    cdef int a_columns = <int>out.dims[1], b_columns = <int>out.dims[2], row_tiles, column_tiles, vectors
    cdef int64_t num_groups = out.dims[0]
    cdef int64_t num_rows = a.dims[0] if a_index is None else a_index.dims[0]
    cdef uintptr_t left = address(a_index), right = address(b_index)
    cdef uintptr_t addresses = address(a) | address(b) | address(out)
    cdef int path
    path = path_of(
        "wgrad", a.dtype, addresses, num_groups, num_rows, a_columns, b_columns, space.device_id,
        (left != 0) + (right != 0), chunks,
    )
    if path >= CLUSTER:
        sm90.grouped_gemm_wgrad(space, a, b, expert_offsets, a_index, b_index, out, accumulate, scale, chunks)
        return
    row_tiles = <int>divided_up(a_columns, TILE_ROWS)
    column_tiles = <int>divided_up(b_columns, TILE_COLUMNS[path])
    vectors = in_vectors(addresses, a_columns, b_columns)
    cdef Parameter[13] params = [
        &a.data, &b.data, &expert_offsets.data, &left, &right, &out.data,
        &chunks, &a_columns, &b_columns, &row_tiles, &column_tiles, &scale, &vectors,
    ]
    launch(
        space, path, "grouped_gemm_wgrad", _wgrad[path, a.dtype, out.dtype, accumulate],
        <int64_t>row_tiles * column_tiles, num_groups, params,
    )


def grouped_glu(
    Space space, Array x, Array w_up, Array expert_offsets, Array row_index, str activation, Array z, Array a,
    int chunks=1, int chunk=0,
):
    cdef int num_groups = <int>w_up.dims[0], num_rows = <int>a.dims[0]
    cdef int depth = <int>x.dims[1], intermediate = <int>a.dims[1], column_tiles, vectors
    cdef int act = ACTIVATIONS[activation]
    cdef uintptr_t index = address(row_index), kept = address(z)
    cdef uintptr_t addresses = address(x) | address(w_up) | kept | address(a)
    cdef int64_t tiles_down = row_tiles(num_rows, num_groups)
    cdef int path
    if num_rows == 0:
        return
    path = path_of(
        "glu", x.dtype, addresses, num_groups, num_rows, depth, intermediate, space.device_id, index != 0, chunks,
    )
    cdef Parameter[10] few
    if path == ROWS:
        few = [
            &x.data, &w_up.data, &expert_offsets.data, &index, &kept, &a.data, &num_groups, &num_rows, &depth,
            &intermediate,
        ]
        launch_rows(space, "grouped_glu", _rows_glu[x.dtype, act], num_rows, 2 * <int64_t>intermediate, few)
        return
    if path >= CLUSTER:
        sm90.grouped_glu(space, x, w_up, expert_offsets, row_index, act, z, a, path == PACED, chunks, chunk)
        return
    column_tiles = <int>divided_up(2 * <int64_t>intermediate, TILE_COLUMNS[path])
    vectors = in_vectors(addresses, depth, intermediate)
    cdef Parameter[15] params = [
        &x.data, &w_up.data, &expert_offsets.data, &index, &kept, &a.data,
        &num_groups, &num_rows, &chunks, &chunk, &depth, &intermediate, &column_tiles, &vectors, &act,
    ]
    launch(
        space, path, "grouped_glu", _glu[path, x.dtype, act],
        tiles_down * column_tiles, 1, params,
    )


def grouped_glu_backward(
    Space space, Array dout, Array w_down, Array expert_offsets, Array row_index, Array row_weights,
    Array z, str activation, Array dz, Array pa, Array dp_rows, int chunks=1, int chunk=0,
):
    cdef int num_groups = <int>w_down.dims[0], num_rows = <int>pa.dims[0]
    cdef int depth = <int>dout.dims[1], intermediate = <int>pa.dims[1], column_tiles, vectors
    cdef int act = ACTIVATIONS[activation]
    cdef int count
    cdef uintptr_t index = address(row_index)
    cdef uintptr_t addresses = address(dout) | address(w_down) | address(z) | address(dz) | address(pa)
    cdef int64_t tiles_down = row_tiles(num_rows, num_groups)
    cdef int path
    if num_rows == 0:
        return
    path = path_of(
        "glu_backward", dout.dtype, addresses, num_groups, num_rows, depth, intermediate, space.device_id,
        index != 0, chunks,
    )
    # so many columns have their part of a row's dot product; the parts are added in order
    count = <int>divided_up(intermediate, sm90.PART_COLUMNS if path >= CLUSTER else PART_COLUMNS)
    cdef Array parts = dp_rows if count == 1 else space.empty((count, num_rows), dp_rows.dtype)
    cdef Parameter[18] params
    if path >= CLUSTER:
        sm90.grouped_glu_backward(
            space, dout, w_down, expert_offsets, row_index, row_weights, z, act, dz, pa, parts, path == PACED,
            chunks, chunk,
        )
    else:
        column_tiles = <int>divided_up(intermediate, TILE_COLUMNS[path])
        vectors = in_vectors(addresses, depth, intermediate)
        params = [
            &dout.data, &w_down.data, &expert_offsets.data, &index, &row_weights.data, &z.data, &dz.data,
            &pa.data, &parts.data, &num_groups, &num_rows, &chunks, &chunk, &depth, &intermediate, &column_tiles,
            &vectors, &act,
        ]
        launch(
            space, path, "grouped_glu_backward", _glu_backward[path, dout.dtype, act],
            tiles_down * column_tiles, 1, params,
        )
    if count > 1:
        sum_parts(space, parts, dp_rows, count)


cdef int sum_parts(Space space, Array parts, Array out, int count) except -1:
    """out = parts[0] + ... + parts[count - 1], in this order."""
    cdef int64_t size = out.size, blocks = divided_up(size, SUM_THREADS)
    cdef Parameter[4] params = [&parts.data, &out.data, &size, &count]
    blocks = min(blocks, 8 * multiprocessor_count(space.device_id))
    return kernel(FILES[SIMT], "sum_parts", _sum[out.dtype], space.device_id, 0).launch(
        <unsigned int>blocks, 1, 1, SUM_THREADS, 0, space.stream, params
    )
