"""Arrays of one number, by the driver's own means."""

from libc.stdint cimport int32_t, uintptr_t

from ..arrays cimport FLOAT64, INT32, Array, Space
from .launch cimport set_words


def fill(Space space, Array out, double value):
    cdef int32_t integer = <int32_t>value
    cdef float single = <float>value
    cdef void* element = &single
    if out.dtype == INT32:
        element = &integer
    elif out.dtype == FLOAT64:
        element = &value
    cdef int words = 2 if out.dtype == FLOAT64 else 1
    if out.size > 0:
        set_words(
            space.device_id, <uintptr_t>out.data, <const unsigned int*>element, words, out.size, space.stream
        )
