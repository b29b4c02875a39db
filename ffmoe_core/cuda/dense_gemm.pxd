from ..arrays cimport Array, Space

cdef int dense_gemm(
    Space space, Array a, Array b, Array out, bint transpose_a, bint transpose_b,
    Array rows=*, Array token_rows=*,
) except -1
