from ..arrays cimport Array, Space

cdef bint serves(Space space, Array d_logits, Array x, Array d_gate) except -1
cdef int gate_wgrad(Space space, Array d_logits, Array topk_idx, Array x, Array d_gate) except -1
