"""Matrix products over groups of rows, by blocks that a thread loads into the computing type.

The computing type (``real``) is float64 for a float64 layer and else float32.
"""

from libc.stdint cimport int32_t, int64_t

from ..arrays cimport FLOAT32, FLOAT64, Array
from .blas cimport SMALL_DIM, gemm, real
from .convert cimport load
from .tiles cimport Scratch, Tile, block_start, blocks
from .transpose cimport transpose

cdef enum:
    COLUMNS = 512  # columns of one unit of work, at most
    DEPTH = 2048  # longest stretch of the inner dimension loaded at a time
    TURNED_DEPTH = 256  # and of a matrix that is transposed on the way
    TURNED_PAD = 16  # keeps its rows off each other's places in the cache
    ENOUGH_UNITS = 16  # fewer units than this are cut finer, down to
    FEWEST_COLUMNS = 64


cdef struct Operand:
    # A row-major matrix of any dtype; with an index, its row i lies in memory as row index[i].
    char* data
    const int32_t* index
    int64_t width
    int dtype
    int itemsize
    bint direct  # BLAS can read it where it lies


cdef struct Buffer:
    # A thread's copy of a block of an operand, and which block that is.
    char* data
    char* source
    int64_t row
    int64_t column
    int rows
    int columns


cdef struct Worker:
    # What one thread works with: blocks of the two operands, and scratch for what it computes from them.
    Buffer a
    Buffer b
    char* c


cdef class Crew:
    """A Worker for each thread."""

    cdef int threads
    cdef Worker* workers
    cdef Scratch memory


cdef Crew crew(int64_t a_bytes, int64_t b_bytes, int64_t c_bytes)

cdef Operand operand(Array array, const int32_t* index, int64_t width, bint double_precision)


cdef inline char* element(const Operand* matrix, int64_t row, int64_t column) noexcept nogil:
    return matrix.data + (row * matrix.width + column) * matrix.itemsize


cdef inline Operand part(const Operand* stack, int64_t number, int64_t rows) noexcept nogil:
    """Matrix ``number`` of a stack of matrices of ``rows`` rows each."""
    cdef Operand out = stack[0]
    out.data = element(stack, number * rows, 0)
    return out


cdef inline void block(
    const Operand* matrix, int64_t row, int rows, int64_t column, int columns,
    Buffer* buffer, real** out, int* ld,
) noexcept nogil:
    """A block as BLAS can read it: where it lies, or the thread's copy (which may be there already)."""
    cdef int64_t i, source
    if matrix.direct:
        out[0] = <real*>element(matrix, row, column)
        ld[0] = <int>matrix.width
        return
    out[0] = <real*>buffer.data
    ld[0] = columns
    if (
        buffer.source == matrix.data and buffer.row == row and buffer.rows == rows
        and buffer.column == column and buffer.columns == columns
    ):
        return
    for i in range(rows):
        source = matrix.index[row + i] if matrix.index != NULL else row + i
        load(matrix.dtype, columns, element(matrix, source, column), out[0] + i * columns)
    buffer.source = matrix.data
    buffer.row = row
    buffer.rows = rows
    buffer.column = column
    buffer.columns = columns


cdef inline void tile_product(
    const Operand* a, const Tile* tile, int64_t depth, const Operand* b, bint transpose_b,
    int64_t column, int columns, Worker* worker, bint accumulate, real* c, int ldc,
) noexcept nogil:
    """c (+)= the tile's rows of ``a`` times columns ``column: column + columns`` of op(b)."""
    cdef bint turn = b.direct and not transpose_b and tile.rows > SMALL_DIM
    cdef int64_t start, stop, index, count = blocks(depth, TURNED_DEPTH if turn else DEPTH)
    cdef int lda, ldb
    cdef real beta = 1 if accumulate else 0
    cdef real* a_block
    cdef real* b_block
    if a.direct and b.direct and not turn:
        count = 1
    for index in range(count):
        start = block_start(depth, count, index)
        stop = block_start(depth, count, index + 1)
        if start == stop:
            break
        block(a, tile.first, tile.rows, start, <int>(stop - start), &worker.a, &a_block, &lda)
        if turn:
            # OpenBLAS reads a matrix that lies this way down its columns, a cache miss at every element
            b_block = <real*>worker.b.data
            ldb = <int>(stop - start) + TURNED_PAD
            transpose(stop - start, columns, <const real*>element(b, start, column), b.width, b_block, ldb)
        elif transpose_b:
            block(b, column, columns, start, <int>(stop - start), &worker.b, &b_block, &ldb)
        else:
            block(b, start, <int>(stop - start), column, columns, &worker.b, &b_block, &ldb)
        gemm(
            False, transpose_b or turn, tile.rows, columns, <int>(stop - start),
            1, a_block, lda, b_block, ldb, beta, c, ldc,
        )
        beta = 1


cdef inline int64_t column_blocks(int64_t tiles, int64_t width) noexcept nogil:
    """Into how many units a tile's columns are cut: enough of them to share out, no narrower than needed."""
    cdef int64_t count = blocks(width, COLUMNS)
    while count * tiles < ENOUGH_UNITS and blocks(width, 2 * count) >= FEWEST_COLUMNS:
        count *= 2
    return count


cdef inline int64_t loaded_bytes(const Operand* a, int64_t rows, int64_t columns) noexcept nogil:
    """The memory a Buffer needs for blocks of ``a`` of up to rows x columns."""
    return 0 if a.direct else rows * columns * (8 if a.dtype == FLOAT64 else 4)


cdef inline int64_t stack_bytes(
    const Operand* b, bint transpose_b, int64_t depth, int64_t columns
) noexcept nogil:
    """The memory ``tile_product`` needs for blocks of its second operand."""
    if b.direct and not transpose_b:
        return (min(depth, <int64_t>TURNED_DEPTH) + TURNED_PAD) * columns * b.itemsize
    return loaded_bytes(b, min(depth, <int64_t>DEPTH), columns)


cdef int zero(char* data, int64_t nbytes) except -1

cdef int rows_product(
    Array a, const int32_t* a_index, Array b, const int32_t* offsets, int64_t num_groups,
    bint transpose_b, Array out, bint accumulate, int chunks=*, int chunk=*,
) except -1

cdef int rows_wgrad(
    Array a, const int32_t* a_index, Array b, const int32_t* b_index, const int32_t* offsets,
    int64_t num_groups, Array out, bint accumulate, double scale, int chunks=*,
) except -1
