from libc.stdint cimport int64_t

from .arrays cimport Array
from .moe cimport RoutingParts


cdef class Plans:
    """How large the three plans of a layer are. Layouts are those of packed_layout."""

    cdef object config
    cdef int64_t num_ranks, num_local
    cdef int num_chunks
    cdef int64_t most_ranks  # D: that a token can go to
    cdef int64_t num_slots  # S: that go with a token
    cdef tuple routing_layout(self, int64_t num_tokens, int router)
    cdef tuple sending_layout(self, int64_t num_tokens, int router)
    cdef tuple receiving_layout(self, int64_t num_received, int router)
    cdef RoutingParts routing(self, dispatched, int router)
    cdef RoutingParts sending(self, dispatched, int router)
    cdef RoutingParts receiving(self, dispatched, int router)


cdef Array first(Array array, int64_t count)
cdef Array chunk_of(Array array, tuple counts, int chunk, int num_ranks)
cdef double flop_beside(int64_t nbytes) except -1
