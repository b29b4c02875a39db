"""A copy of a block, transposed (transpose.h)."""

from libc.stdint cimport int64_t

from .blas cimport real

cdef extern from "transpose.h" nogil:
    void ffmoe_transpose_f32(
        int64_t rows, int64_t columns, const float* source, int64_t ld, float* to, int64_t ld_to
    )
    void ffmoe_transpose_f64(
        int64_t rows, int64_t columns, const double* source, int64_t ld, double* to, int64_t ld_to
    )


cdef inline void transpose(
    int64_t rows, int64_t columns, const real* source, int64_t ld, real* to, int64_t ld_to
) noexcept nogil:
    """to[j, i] = source[i, j]."""
    if real is float:
        ffmoe_transpose_f32(rows, columns, source, ld, to, ld_to)
    else:
        ffmoe_transpose_f64(rows, columns, source, ld, to, ld_to)
