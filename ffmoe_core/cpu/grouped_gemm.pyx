"""The grouped products of a layer, with what is fused into them."""

from cython.parallel cimport prange, threadid
from libc.stdint cimport int32_t, int64_t

from ..arrays cimport FLOAT64, Array, Space, itemsize
from .activation cimport activation_kind, glu, glu_backward
from .blas cimport enter_single_threaded, leave_single_threaded, real
from .convert cimport load, store
from .products cimport (
    COLUMNS,
    DEPTH,
    Crew,
    Operand,
    Worker,
    column_blocks,
    crew,
    element,
    loaded_bytes,
    operand,
    part,
    rows_product,
    rows_wgrad,
    stack_bytes,
    tile_product,
    zero,
)
from .tiles cimport TILE_ROWS, Scratch, Tile, block_start, blocks, chunk_of, cut_rows, scratch


cdef inline const int32_t* index_of(Array index):
    if index is None:
        return NULL
    return <const int32_t*>index.data


cdef int zero_tail(Array rows, int64_t first, int chunks) except -1:
    """Rows from ``first`` on belong to no expert. Chunks leave all rows but their own alone."""
    if chunks > 1:
        return 0
    cdef int64_t row_bytes = rows.size // max(rows.dims[0], 1) * itemsize(rows.dtype)
    return zero(rows.data + first * row_bytes, (rows.dims[0] - first) * row_bytes)


def grouped_gemm(
    Space space, Array a, Array b, Array expert_offsets, Array row_index, bint transpose_b, Array out,
    int chunks=1, int chunk=0,
):
    cdef const int32_t* offsets = <const int32_t*>expert_offsets.data
    cdef int64_t num_experts = b.dims[0]
    rows_product(a, index_of(row_index), b, offsets, num_experts, transpose_b, out, False, chunks, chunk)
    zero_tail(out, offsets[num_experts * chunks], chunks)


def grouped_gemm_wgrad(
    Space space, Array a, Array b, Array expert_offsets, Array a_index, Array b_index, Array out,
    bint accumulate, double scale=1.0, int chunks=1,
):
    cdef const int32_t* offsets = <const int32_t*>expert_offsets.data
    rows_wgrad(
        a, index_of(a_index), b, index_of(b_index), offsets, out.dims[0], out, accumulate, scale, chunks
    )


# --- the up-projection and its activation ---

cdef struct Glu:
    Operand x
    Operand w_up
    Operand z
    Operand a
    bint keep_z
    const Tile* tiles
    int64_t hidden
    int64_t intermediate
    int64_t cuts
    int kind


cdef void glu_unit(const Glu* job, int64_t unit, Worker* worker, real* c) noexcept nogil:
    cdef const Tile* tile = job.tiles + unit // job.cuts
    cdef int64_t column = block_start(job.intermediate, job.cuts, unit % job.cuts)
    cdef int columns = <int>(block_start(job.intermediate, job.cuts, unit % job.cuts + 1) - column)
    if columns == 0:
        return
    cdef Operand w = part(&job.w_up, tile.group, 2 * job.intermediate)
    cdef int64_t i, row
    cdef int64_t ld = columns
    cdef real* gate = c
    cdef real* up = c + <int64_t>tile.rows * columns
    if job.keep_z and job.z.direct:
        gate = <real*>element(&job.z, tile.first, column)
        up = gate + job.intermediate
        ld = job.z.width
    tile_product(&job.x, tile, job.hidden, &w, True, column, columns, worker, False, gate, <int>ld)
    tile_product(
        &job.x, tile, job.hidden, &w, True, job.intermediate + column, columns, worker, False, up, <int>ld
    )
    for i in range(tile.rows):
        row = tile.first + i
        if job.keep_z and not job.z.direct:
            store(job.z.dtype, columns, gate + i * ld, element(&job.z, row, column))
            store(job.z.dtype, columns, up + i * ld, element(&job.z, row, job.intermediate + column))
        if job.a.direct:
            glu(job.kind, columns, gate + i * ld, up + i * ld, <real*>element(&job.a, row, column))
        else:
            glu(job.kind, columns, gate + i * ld, up + i * ld, gate + i * ld)
            store(job.a.dtype, columns, gate + i * ld, element(&job.a, row, column))


def grouped_glu(
    Space space, Array x, Array w_up, Array expert_offsets, Array row_index, str activation, Array z, Array a,
    int chunks=1, int chunk=0,
):
    cdef bint double_precision = x.dtype == FLOAT64
    cdef const int32_t* offsets = <const int32_t*>expert_offsets.data
    cdef int64_t num_experts = w_up.dims[0], num_rows = offsets[num_experts * chunks]
    cdef Glu job
    job.hidden = x.dims[1]
    job.intermediate = a.dims[1]
    job.kind = activation_kind(activation)
    job.x = operand(x, index_of(row_index), job.hidden, double_precision)
    job.w_up = operand(w_up, NULL, job.hidden, double_precision)
    job.a = operand(a, NULL, job.intermediate, double_precision)
    job.keep_z = z is not None
    if job.keep_z:
        job.z = operand(z, NULL, 2 * job.intermediate, double_precision)
    cdef Scratch tiles = scratch((num_experts + blocks(num_rows, TILE_ROWS)) * sizeof(Tile))
    cdef int64_t num_tiles = cut_rows(offsets, num_experts, chunks, chunk, <Tile*>tiles.data)
    job.tiles = <const Tile*>tiles.data
    job.cuts = column_blocks(num_tiles, job.intermediate)
    cdef int64_t deep = min(job.hidden, <int64_t>DEPTH), wide = min(job.intermediate, <int64_t>COLUMNS)
    cdef int width = 8 if double_precision else 4
    cdef Crew workers = crew(
        loaded_bytes(&job.x, TILE_ROWS, deep),
        stack_bytes(&job.w_up, True, job.hidden, wide),
        2 * TILE_ROWS * wide * width,
    )
    cdef Worker* worker = workers.workers
    cdef int threads = workers.threads
    cdef int64_t unit, units = num_tiles * job.cuts
    cdef int64_t share = chunk_of(units, threads)
    enter_single_threaded()
    for unit in prange(units, nogil=True, num_threads=threads, schedule="dynamic", chunksize=share):
        if double_precision:
            glu_unit(&job, unit, worker + threadid(), <double*>worker[threadid()].c)
        else:
            glu_unit(&job, unit, worker + threadid(), <float*>worker[threadid()].c)
    leave_single_threaded()
    zero_tail(a, num_rows, chunks)
    if z is not None:
        zero_tail(z, num_rows, chunks)


# --- back through the down-projection and the activation ---

cdef struct GluBackward:
    Operand dout
    Operand w_down
    Operand z
    Operand dz
    Operand pa
    const char* row_weights
    char* dp  # [R, cuts]: each unit's part of dp
    const Tile* tiles
    int64_t hidden
    int64_t intermediate
    int64_t cuts
    int kind


cdef void glu_backward_unit(const GluBackward* job, int64_t unit, Worker* worker, real* c) noexcept nogil:
    cdef const Tile* tile = job.tiles + unit // job.cuts
    cdef int64_t cut = unit % job.cuts, middle = job.intermediate
    cdef int64_t column = block_start(middle, job.cuts, cut)
    cdef int columns = <int>(block_start(middle, job.cuts, cut + 1) - column)
    cdef Operand w = part(&job.w_down, tile.group, job.hidden)
    cdef const real* p = <const real*>job.row_weights
    cdef real* dp = <real*>job.dp
    cdef int64_t i, row
    cdef real* da
    cdef real* gate = c + <int64_t>tile.rows * columns  # a row's worth, for types BLAS does not read
    cdef real* up = gate + columns
    if columns > 0:
        tile_product(&job.dout, tile, job.hidden, &w, False, column, columns, worker, False, c, columns)
    for i in range(tile.rows):
        row = tile.first + i
        da = c + i * columns
        if columns == 0:
            dp[row * job.cuts + cut] = 0
        elif job.z.direct:
            dp[row * job.cuts + cut] = glu_backward(
                job.kind, columns,
                <const real*>element(&job.z, row, column), <const real*>element(&job.z, row, middle + column),
                da, p[row],
                <real*>element(&job.dz, row, column), <real*>element(&job.dz, row, middle + column),
                <real*>element(&job.pa, row, column),
            )
        else:
            load(job.z.dtype, columns, element(&job.z, row, column), gate)
            load(job.z.dtype, columns, element(&job.z, row, middle + column), up)
            dp[row * job.cuts + cut] = glu_backward(job.kind, columns, gate, up, da, p[row], gate, up, da)
            store(job.dz.dtype, columns, gate, element(&job.dz, row, column))
            store(job.dz.dtype, columns, up, element(&job.dz, row, middle + column))
            store(job.pa.dtype, columns, da, element(&job.pa, row, column))


cdef inline void sum_rows(const Tile* tile, int64_t cuts, const real* parts, real* out) noexcept nogil:
    cdef real total
    cdef int64_t row, i
    for row in range(tile.first, tile.first + tile.rows):
        total = 0
        for i in range(cuts):
            total += parts[row * cuts + i]
        out[row] = total


def grouped_glu_backward(
    Space space, Array dout, Array w_down, Array expert_offsets, Array row_index, Array row_weights, Array z,
    str activation, Array dz, Array pa, Array dp_rows, int chunks=1, int chunk=0,
):
    cdef bint double_precision = dout.dtype == FLOAT64
    cdef const int32_t* offsets = <const int32_t*>expert_offsets.data
    cdef int64_t num_experts = w_down.dims[0], num_rows = offsets[num_experts * chunks]
    cdef int width = 8 if double_precision else 4
    cdef GluBackward job
    job.hidden = dout.dims[1]
    job.intermediate = pa.dims[1]
    job.kind = activation_kind(activation)
    job.dout = operand(dout, index_of(row_index), job.hidden, double_precision)
    job.w_down = operand(w_down, NULL, job.intermediate, double_precision)
    job.z = operand(z, NULL, 2 * job.intermediate, double_precision)
    job.dz = operand(dz, NULL, 2 * job.intermediate, double_precision)
    job.pa = operand(pa, NULL, job.intermediate, double_precision)
    job.row_weights = row_weights.data
    cdef Scratch tiles = scratch((num_experts + blocks(num_rows, TILE_ROWS)) * sizeof(Tile))
    cdef int64_t num_tiles = cut_rows(offsets, num_experts, chunks, chunk, <Tile*>tiles.data)
    job.tiles = <const Tile*>tiles.data
    job.cuts = column_blocks(num_tiles, job.intermediate)
    cdef Scratch parts = scratch(num_rows * job.cuts * width)
    job.dp = parts.data
    cdef int64_t deep = min(job.hidden, <int64_t>DEPTH), wide = min(job.intermediate, <int64_t>COLUMNS)
    cdef Crew workers = crew(
        loaded_bytes(&job.dout, TILE_ROWS, deep),
        stack_bytes(&job.w_down, False, job.hidden, wide),
        (TILE_ROWS + 2) * wide * width,
    )
    cdef Worker* worker = workers.workers
    cdef int threads = workers.threads
    cdef int64_t unit, units = num_tiles * job.cuts, cuts = job.cuts
    cdef char* dp = dp_rows.data
    cdef int64_t share = chunk_of(units, threads)
    enter_single_threaded()
    for unit in prange(units, nogil=True, num_threads=threads, schedule="dynamic", chunksize=share):
        if double_precision:
            glu_backward_unit(&job, unit, worker + threadid(), <double*>worker[threadid()].c)
        else:
            glu_backward_unit(&job, unit, worker + threadid(), <float*>worker[threadid()].c)
    leave_single_threaded()
    for unit in prange(num_tiles, nogil=True, num_threads=threads, schedule="static"):
        if double_precision:
            sum_rows(job.tiles + unit, cuts, <const double*>job.dp, <double*>dp)
        else:
            sum_rows(job.tiles + unit, cuts, <const float*>job.dp, <float*>dp)
    zero_tail(dz, num_rows, chunks)
    zero_tail(pa, num_rows, chunks)
    zero_tail(dp_rows, num_rows, chunks)
