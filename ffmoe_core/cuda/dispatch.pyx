"""Launches of kernels/dispatch.cu: who gets which token when experts are spread over ranks."""

from libc.stdint cimport int32_t, int64_t

from ..arrays cimport FLOAT32, FLOAT64, Array, Space
from .launch cimport Parameter, kernel

cdef enum:
    THREADS = 256

cdef list _DEFINES = [(f"W_TYPE={dtype}",) for dtype in (<int>FLOAT32, <int>FLOAT64)]


def variants():
    """Every (file, entry, defines) that these stages can launch."""
    return [("dispatch.cu", "dispatch_ranks", _DEFINES[0])] + [
        ("dispatch.cu", "dispatch_slots", defines) for defines in _DEFINES
    ]


# The same as in kernels/dispatch.cu.
cdef struct Share:
    int32_t num_ranks
    int32_t size
    int32_t longer


cdef Share _share(int64_t num_experts, int64_t num_ranks) noexcept:
    return Share(
        <int32_t>num_ranks, <int32_t>(num_experts // num_ranks), <int32_t>(num_experts % num_ranks)
    )


cdef unsigned int _blocks(int64_t num_tokens) noexcept:
    return <unsigned int>max(1, (num_tokens + THREADS - 1) // THREADS)


def dispatch_ranks(
    Space space, Array topk_idx, Array token_rows, num_experts, num_ranks, Array ranks, int32_t chunks=1
):
    cdef Share share = _share(num_experts, num_ranks)
    cdef int64_t num_tokens = topk_idx.dims[0]
    cdef int32_t top_k = <int32_t>topk_idx.dims[1], most_ranks = <int32_t>ranks.dims[1]
    if num_tokens == 0:
        return
    cdef Parameter[8] params = [
        &share, &topk_idx.data, &token_rows.data, &num_tokens, &top_k, &most_ranks, &chunks, &ranks.data
    ]
    kernel("dispatch.cu", "dispatch_ranks", _DEFINES[0], space.device_id, 0).launch(
        _blocks(num_tokens), 1, 1, THREADS, 0, space.stream, params
    )


def dispatch_slots(
    Space space, Array topk_idx, Array topk_weights, Array token_rows, Array expert_offsets, Array ranks,
    Array send_rows, Array send_offsets, Array slot_experts, Array slot_weights, Array pair_slots, Array counts,
    int32_t chunks=1,
):
    cdef Share share = _share(expert_offsets.dims[0] - 1, (send_offsets.dims[0] - 1) // chunks)
    cdef int64_t num_tokens = topk_idx.dims[0]
    cdef int32_t top_k = <int32_t>topk_idx.dims[1], most_ranks = <int32_t>ranks.dims[1]
    cdef int32_t num_slots = <int32_t>slot_experts.dims[1]
    cdef tuple defines = _DEFINES[1 if topk_weights.dtype == FLOAT64 else 0]
    cdef Parameter[17] params = [
        &share, &topk_idx.data, &topk_weights.data, &token_rows.data, &expert_offsets.data, &ranks.data,
        &send_rows.data, &send_offsets.data, &num_tokens, &top_k, &most_ranks, &chunks, &num_slots,
        &slot_experts.data, &slot_weights.data, &pair_slots.data, &counts.data,
    ]
    kernel("dispatch.cu", "dispatch_slots", defines, space.device_id, 0).launch(
        _blocks(num_tokens), 1, 1, THREADS, 0, space.stream, params
    )
