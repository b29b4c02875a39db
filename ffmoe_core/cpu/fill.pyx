"""Arrays of one number."""

from libc.stdint cimport int32_t, int64_t

from ..arrays cimport FLOAT64, INT32, Array, Space


def fill(Space space, Array out, double value):
    cdef int64_t i, size = out.size
    if out.dtype == INT32:
        for i in range(size):
            (<int32_t*>out.data)[i] = <int32_t>value
    elif out.dtype == FLOAT64:
        for i in range(size):
            (<double*>out.data)[i] = value
    else:
        for i in range(size):
            (<float*>out.data)[i] = <float>value
