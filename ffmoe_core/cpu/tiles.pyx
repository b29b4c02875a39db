"""How the rows of groups are cut into tiles, and the scratch memory of the threads that work on them.

Everything here follows from shapes and row counts alone, never from the number of threads, so that the
products and sums are the same at any thread count.
"""

from libc.stdlib cimport free, malloc

from ..errors import OutOfMemoryError


cdef class Scratch:
    def __dealloc__(self):
        free(self.data)


cdef Scratch scratch(int64_t nbytes):
    cdef Scratch out = Scratch.__new__(Scratch)
    out.data = <char*>malloc(max(nbytes, 1))
    if out.data == NULL:
        raise OutOfMemoryError(f"no room on the host for {nbytes} bytes of scratch memory")
    return out


cdef int64_t cut_rows(
    const int32_t* offsets, int64_t num_groups, int chunks, int chunk, Tile* tiles
) noexcept nogil:
    """Write the tiles of every group in order; returns how many: at most num_groups + rows / TILE_ROWS.

    A group's rows come in ``chunks`` runs, one after the other; of those only the chunk-th.
    """
    cdef int64_t group, size, count, index, start, stop, first, written = 0
    for group in range(num_groups):
        first = offsets[group * chunks + chunk]
        size = offsets[group * chunks + chunk + 1] - first
        count = blocks(size, TILE_ROWS)
        for index in range(count):
            start = block_start(size, count, index)
            stop = block_start(size, count, index + 1)
            if start < stop:
                tiles[written] = Tile(first + start, <int32_t>(stop - start), <int32_t>group)
                written += 1
    return written
