from libc.stdint cimport int64_t, uintptr_t

from ..arrays cimport Array, Space

cdef enum:
    PART_COLUMNS = 256  # of a row's dot product in grouped_glu_backward

cdef bint runs_on(int device, int64_t num_groups) except -1
cdef bint serves(int dtype, uintptr_t addresses, int64_t widths, int64_t num_groups, int device) except -1
cdef int grouped_gemm(
    Space space, Array a, Array b, Array expert_offsets, Array row_index, bint transpose_b, Array out,
    bint paced, int chunks, int chunk,
) except -1
cdef int grouped_gemm_in_turns(
    Space space, Array a, Array b, Array expert_offsets, bint transpose_b, Array out, bint paced,
    int chunks, int chunk,
) except -1
cdef int grouped_gemm_wgrad(
    Space space, Array a, Array b, Array expert_offsets, Array a_index, Array b_index, Array out,
    bint accumulate, double scale, int chunks=*,
) except -1
cdef int grouped_glu(
    Space space, Array x, Array w_up, Array expert_offsets, Array row_index, int act, Array z, Array a,
    bint paced, int chunks, int chunk,
) except -1
cdef int grouped_glu_backward(
    Space space, Array dout, Array w_down, Array expert_offsets, Array row_index, Array row_weights,
    Array z, int act, Array dz, Array pa, Array parts,
    bint paced, int chunks, int chunk,
) except -1
