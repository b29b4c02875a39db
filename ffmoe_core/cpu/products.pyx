"""Matrix products over groups of rows, by blocks that a thread loads into the computing type.

The work is cut into units (some rows of a group times some columns) by shapes and row counts alone, each
unit is computed by one thread in a fixed order, and no two units write the same memory: the result has the
same bits at any thread count.
"""

from cython.parallel cimport prange, threadid
from libc.string cimport memset

from ..arrays cimport itemsize
from .blas cimport enter_single_threaded, leave_single_threaded
from .convert cimport store
from .threads cimport num_threads
from .tiles cimport TILE_ROWS, chunk_of, cut_rows, scratch

cdef enum:
    WGRAD_ROWS = 512  # rows of a group that a weight gradient sums at a time
    WGRAD_SIDE = 512  # its tiles of the gradient are at most this wide and high
    FEWEST_SIDE = 128
    ZERO_BYTES = 1 << 20
    CACHE_LINE = 64


cdef Crew crew(int64_t a_bytes, int64_t b_bytes, int64_t c_bytes):
    cdef Crew out = Crew.__new__(Crew)
    cdef int i
    cdef char* mine
    # one allocation of the calling thread: the C library gives it back unmapped or still in cache, where many
    # large ones would each be mapped, faulted in and unmapped again at every call
    a_bytes, b_bytes, c_bytes = [blocks(n, CACHE_LINE) * CACHE_LINE for n in (a_bytes, b_bytes, c_bytes)]
    cdef int64_t header, share = a_bytes + b_bytes + c_bytes
    out.threads = num_threads()
    header = blocks(out.threads * sizeof(Worker), CACHE_LINE) * CACHE_LINE
    out.memory = scratch(header + out.threads * share)
    out.workers = <Worker*>out.memory.data
    memset(out.workers, 0, out.threads * sizeof(Worker))
    for i in range(out.threads):
        mine = out.memory.data + header + i * share
        out.workers[i].a.data = mine
        out.workers[i].b.data = mine + a_bytes
        out.workers[i].c = mine + a_bytes + b_bytes
    return out


cdef Operand operand(Array array, const int32_t* index, int64_t width, bint double_precision):
    cdef Operand out
    out.data = array.data
    out.index = index
    out.width = width
    out.dtype = array.dtype
    out.itemsize = itemsize(array.dtype)
    out.direct = index == NULL and array.dtype == <int>(FLOAT64 if double_precision else FLOAT32)
    return out


cdef int zero(char* data, int64_t nbytes) except -1:
    cdef int64_t i, count = blocks(nbytes, ZERO_BYTES)
    cdef int threads = num_threads()
    for i in prange(count, nogil=True, num_threads=threads, schedule="static"):
        memset(data + i * ZERO_BYTES, 0, min(<int64_t>ZERO_BYTES, nbytes - i * ZERO_BYTES))
    return 0


# --- out[rows of g] = a[rows of g] op(b[g]) ---

cdef struct Product:
    Operand a
    Operand b
    Operand out
    const Tile* tiles
    int64_t depth
    int64_t cuts  # units a tile's columns are cut into
    bint transpose_b
    bint accumulate


cdef inline void add_row(int dtype, int64_t n, const real* values, char* into, real* sums) noexcept nogil:
    cdef int64_t i
    load(dtype, n, into, sums)
    for i in range(n):
        sums[i] += values[i]
    store(dtype, n, sums, into)


cdef void product_unit(const Product* job, int64_t unit, Worker* worker, real* c) noexcept nogil:
    cdef const Tile* tile = job.tiles + unit // job.cuts
    cdef int64_t width = job.out.width, i
    cdef int64_t column = block_start(width, job.cuts, unit % job.cuts)
    cdef int columns = <int>(block_start(width, job.cuts, unit % job.cuts + 1) - column)
    cdef Operand b = part(&job.b, tile.group, width if job.transpose_b else job.depth)
    if columns == 0:
        return
    if job.out.direct:
        tile_product(
            &job.a, tile, job.depth, &b, job.transpose_b, column, columns, worker, job.accumulate,
            <real*>element(&job.out, tile.first, column), <int>width,
        )
        return
    tile_product(&job.a, tile, job.depth, &b, job.transpose_b, column, columns, worker, False, c, columns)
    for i in range(tile.rows):
        if job.accumulate:
            # one row past the tile is kept for the sums
            add_row(
                job.out.dtype, columns, c + i * columns, element(&job.out, tile.first + i, column),
                c + <int64_t>tile.rows * columns,
            )
        else:
            store(job.out.dtype, columns, c + i * columns, element(&job.out, tile.first + i, column))


cdef int rows_product(
    Array a, const int32_t* a_index, Array b, const int32_t* offsets, int64_t num_groups,
    bint transpose_b, Array out, bint accumulate, int chunks=1, int chunk=0,
) except -1:
    """out[r] (+)= a[r or a_index[r]] op(b[g]) for the rows r of every group g, offsets[g]: offsets[g + 1].

    With chunks see ``cut_rows``.
    """
    cdef bint double_precision = a.dtype == FLOAT64
    cdef Product job
    job.depth = a.dims[1]
    job.a = operand(a, a_index, job.depth, double_precision)
    job.b = operand(b, NULL, job.depth if transpose_b else out.dims[1], double_precision)
    job.out = operand(out, NULL, out.dims[1], double_precision)
    job.transpose_b = transpose_b
    job.accumulate = accumulate
    cdef Scratch tiles = scratch((num_groups + blocks(offsets[num_groups * chunks], TILE_ROWS)) * sizeof(Tile))
    cdef int64_t num_tiles = cut_rows(offsets, num_groups, chunks, chunk, <Tile*>tiles.data)
    job.tiles = <const Tile*>tiles.data
    job.cuts = column_blocks(num_tiles, job.out.width)
    cdef int64_t deep = min(job.depth, <int64_t>DEPTH), wide = min(job.out.width, <int64_t>COLUMNS)
    cdef int64_t unit, units = num_tiles * job.cuts
    cdef int width = 8 if double_precision else 4
    cdef Crew workers = crew(
        loaded_bytes(&job.a, TILE_ROWS, deep),
        stack_bytes(&job.b, transpose_b, job.depth, wide),
        0 if job.out.direct else (TILE_ROWS + 1) * wide * width,
    )
    cdef Worker* worker = workers.workers
    cdef int threads = workers.threads
    cdef int64_t share = chunk_of(units, threads)
    enter_single_threaded()
    for unit in prange(units, nogil=True, num_threads=threads, schedule="dynamic", chunksize=share):
        if double_precision:
            product_unit(&job, unit, worker + threadid(), <double*>worker[threadid()].c)
        else:
            product_unit(&job, unit, worker + threadid(), <float*>worker[threadid()].c)
    leave_single_threaded()
    return 0


# --- out[g] (+)= scale * sum over the rows r of g of a[r]^T b[r] ---

cdef struct Wgrad:
    Operand a
    Operand b
    Operand out
    const int32_t* offsets
    int chunks
    int64_t height
    int64_t high_cuts
    int64_t wide_cuts
    bint accumulate
    double scale


cdef void wgrad_unit(const Wgrad* job, int64_t unit, Worker* worker, real* c) noexcept nogil:
    cdef int64_t group = unit // (job.high_cuts * job.wide_cuts)
    cdef int64_t cut = unit // job.wide_cuts % job.high_cuts
    cdef int64_t row = block_start(job.height, job.high_cuts, cut)
    cdef int rows = <int>(block_start(job.height, job.high_cuts, cut + 1) - row)
    cdef int64_t width = job.out.width
    cdef int64_t column = block_start(width, job.wide_cuts, unit % job.wide_cuts)
    cdef int columns = <int>(block_start(width, job.wide_cuts, unit % job.wide_cuts + 1) - column)
    if rows == 0 or columns == 0:
        return
    cdef Operand out = part(&job.out, group, job.height)
    cdef int64_t size = job.offsets[(group + 1) * job.chunks] - job.offsets[group * job.chunks], i
    if size == 0:
        if job.accumulate:
            return
        for i in range(rows):
            memset(element(&out, row + i, column), 0, <size_t>columns * out.itemsize)
        return
    cdef int64_t count = blocks(size, WGRAD_ROWS), index, first, last
    cdef int lda, ldb, ldc = columns
    cdef real beta = 1 if job.accumulate and out.direct else 0
    cdef real* a_block
    cdef real* b_block
    if out.direct:
        c = <real*>element(&out, row, column)
        ldc = <int>width
        if job.a.direct and job.b.direct:
            count = 1
    for index in range(count):
        first = job.offsets[group * job.chunks] + block_start(size, count, index)
        last = job.offsets[group * job.chunks] + block_start(size, count, index + 1)
        if first == last:
            break
        block(&job.a, first, <int>(last - first), row, rows, &worker.a, &a_block, &lda)
        block(&job.b, first, <int>(last - first), column, columns, &worker.b, &b_block, &ldb)
        gemm(
            True, False, rows, columns, <int>(last - first), <real>job.scale, a_block, lda, b_block, ldb, beta, c, ldc
        )
        beta = 1
    if out.direct:
        return
    for i in range(rows):
        if job.accumulate:
            # one row past the tile is kept for the sums
            add_row(
                out.dtype, columns, c + i * columns, element(&out, row + i, column),
                c + <int64_t>rows * columns,
            )
        else:
            store(out.dtype, columns, c + i * columns, element(&out, row + i, column))


cdef int rows_wgrad(
    Array a, const int32_t* a_index, Array b, const int32_t* b_index, const int32_t* offsets,
    int64_t num_groups, Array out, bint accumulate, double scale, int chunks=1,
) except -1:
    """out[g] (+)= scale * sum of a[r]^T b[r] over the rows r of group g; out is [num_groups, a's width, b's width].

    out has the dtype of a and b or that of their products. A group's rows are those of ``chunks`` offsets.
    """
    cdef bint double_precision = a.dtype == FLOAT64
    cdef Wgrad job
    job.height = a.dims[1]
    job.a = operand(a, a_index, job.height, double_precision)
    job.b = operand(b, b_index, b.dims[1], double_precision)
    job.out = operand(out, NULL, b.dims[1], double_precision)
    job.offsets = offsets
    job.chunks = chunks
    job.accumulate = accumulate
    job.scale = scale
    cdef int64_t high = min(job.height, <int64_t>WGRAD_SIDE), wide = min(job.out.width, <int64_t>WGRAD_SIDE)
    while (
        num_groups * blocks(job.height, high) * blocks(job.out.width, wide) < ENOUGH_UNITS
        and max(high, wide) > FEWEST_SIDE
    ):
        if wide >= high:
            wide = blocks(wide, 32) * 16
        else:
            high = blocks(high, 32) * 16
    job.high_cuts = blocks(job.height, high)
    job.wide_cuts = blocks(job.out.width, wide)
    cdef int width = 8 if double_precision else 4
    cdef Crew workers = crew(
        loaded_bytes(&job.a, WGRAD_ROWS, high),
        loaded_bytes(&job.b, WGRAD_ROWS, wide),
        0 if job.out.direct else (high + 1) * wide * width,
    )
    cdef Worker* worker = workers.workers
    cdef int threads = workers.threads
    cdef int64_t unit, units = num_groups * job.high_cuts * job.wide_cuts
    cdef int64_t share = chunk_of(units, threads)
    enter_single_threaded()
    for unit in prange(units, nogil=True, num_threads=threads, schedule="dynamic", chunksize=share):
        if double_precision:
            wgrad_unit(&job, unit, worker + threadid(), <double*>worker[threadid()].c)
        else:
            wgrad_unit(&job, unit, worker + threadid(), <float*>worker[threadid()].c)
    leave_single_threaded()
    return 0
