from ..arrays cimport Array, Space

cdef bint serves(Array x, Array gate, Array logits) except -1
cdef int gate_logits(Space space, Array x, Array gate, Array logits) except -1
