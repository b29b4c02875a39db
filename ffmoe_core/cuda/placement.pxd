from libc.stdint cimport int32_t, int64_t

# The same as in kernels/common/placement.cuh, which says what they mean.
cdef struct Slots:
    int64_t count
    int64_t chunk
    int32_t chunks
    int32_t top_k
    int32_t num_experts
    int32_t capacity

cdef struct Plan:
    void* expert_offsets
    void* row_token
    void* row_weights
    void* token_rows
    void* starts
    void* order
    void* keys

cdef enum:
    MOST_CHUNKS = 128  # a block of the next kernel reads all their counts
    NO_BOUND = 0x7fffffff


cdef inline Slots in_chunks(
    int64_t num_tokens, int32_t top_k, int32_t num_experts, int64_t capacity, int64_t tokens_per_chunk
) noexcept:
    """Slots in chunks of at least so many tokens; a capacity below 0 is no bound."""
    cdef int64_t tokens = max(tokens_per_chunk, (num_tokens + MOST_CHUNKS - 1) // MOST_CHUNKS)
    cdef Slots out
    out.count = num_tokens * top_k
    out.chunk = tokens * top_k
    out.chunks = <int32_t>max(1, (num_tokens + tokens - 1) // tokens)
    out.top_k = top_k
    out.num_experts = num_experts
    out.capacity = <int32_t>(NO_BOUND if capacity < 0 or capacity > NO_BOUND else capacity)
    return out


cdef inline unsigned int place_bytes(int warps, int32_t num_experts, int width) noexcept:
    """Shared memory that placing a chunk takes, with weights of so many bytes."""
    return <unsigned int>max(2 * warps * num_experts, 64 * warps * (8 + width))
