from ..arrays cimport Array, Space

cdef bint serves(Array d_chosen, Array gate, Array rows, Array dx) except -1
cdef int router_dx(
    Space space, Array d_chosen, Array topk_idx, Array gate, Array rows, Array token_rows, Array dx
) except -1
