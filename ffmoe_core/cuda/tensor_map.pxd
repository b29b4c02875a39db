from libc.stdint cimport int64_t, uint8_t

from ..arrays cimport Array

cdef enum:
    MAP_ALIGNMENT = 64

# A tensor map, somewhere in an aligned block; ``at`` is where.
cdef struct TensorMap:
    uint8_t memory[192]
    void* at


cdef int map_matrices(
    TensorMap* out, Array array, int64_t matrices, int64_t rows, int64_t columns, int box_rows
) except -1
cdef int map_halves(TensorMap* out, Array array, int64_t rows, int64_t columns, int box_rows) except -1
