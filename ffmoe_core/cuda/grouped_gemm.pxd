from libc.stdint cimport int64_t, uintptr_t

from ..arrays cimport Array, Space

# What the router's products share with the grouped ones.
cdef uintptr_t address(Array array) noexcept
cdef int64_t divided_up(int64_t value, int64_t by) noexcept
cdef int in_vectors(uintptr_t addresses, int64_t width0, int64_t width1) noexcept
cdef int sum_parts(Space space, Array parts, Array out, int count) except -1
