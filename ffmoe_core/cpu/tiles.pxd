"""How the rows of groups are cut into tiles, and the scratch memory of the threads that work on them."""

from libc.stdint cimport int32_t, int64_t

cdef enum:
    TILE_ROWS = 640  # at most; a group is cut evenly, so that its last tile is not a sliver

cdef struct Tile:
    int64_t first
    int32_t rows
    int32_t group


cdef class Scratch:
    """Uninitialised memory that goes when the object goes."""

    cdef char* data


cdef Scratch scratch(int64_t nbytes)


cdef inline int64_t blocks(int64_t size, int64_t most) noexcept nogil:
    """How many blocks of at most ``most`` cover ``size``."""
    return (size + most - 1) // most


cdef inline int64_t block_start(int64_t size, int64_t count, int64_t index) noexcept nogil:
    """Where block ``index`` of ``count`` even ones starts, in steps of 16 as far as ``size`` allows."""
    return min(size, blocks(blocks(size, count), 16) * 16 * index)


cdef inline int64_t chunk_of(int64_t units, int threads) noexcept nogil:
    """How many consecutive units a thread takes at a time: neighbours share loaded operands."""
    return max(1, units // (threads * 8))


cdef int64_t cut_rows(
    const int32_t* offsets, int64_t num_groups, int chunks, int chunk, Tile* tiles
) noexcept nogil
