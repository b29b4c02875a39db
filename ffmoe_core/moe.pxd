from .arrays cimport Array


cdef class RoutingParts:
    """The parts of a packed routing block."""

    cdef readonly Array topk_idx, topk_weights, expert_offsets, row_token, row_weights, token_rows
    cdef readonly Array tokens_per_expert


cdef Array sums_of(object buffer, str name, str symbols, Array weight)
