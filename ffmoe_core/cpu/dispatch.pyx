"""Who gets which token when experts are spread over ranks: rank r holds a run of consecutive experts."""

from cython.parallel cimport prange
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memset

from ..arrays cimport Array, Space, itemsize
from .threads cimport num_threads


cdef struct Share:
    # How experts lie on ranks: the first `longer` ranks hold `size + 1`, the others `size`.
    int64_t num_ranks
    int64_t size
    int64_t longer


cdef Share share_of(int64_t num_experts, int64_t num_ranks) noexcept:
    return Share(num_ranks, num_experts // num_ranks, num_experts % num_ranks)


cdef inline int64_t first_expert(const Share* share, int64_t rank) noexcept nogil:
    return rank * share.size + min(rank, share.longer)


cdef inline int64_t rank_of(const Share* share, int64_t expert) noexcept nogil:
    cdef int64_t in_longer = share.longer * (share.size + 1)
    if expert < in_longer:
        return expert // (share.size + 1)
    return share.longer + (expert - in_longer) // share.size


# A rank's tokens may be cut into chunks that cross one after the other; kernels/dispatch.cu says how they are numbered.

# --- the ranks of a token ---

cdef void find_ranks(
    const Share* share, int64_t top_k, int64_t most, int64_t before, const int32_t* experts, const int32_t* rows,
    int32_t* ranks,
) noexcept nogil:
    cdef int64_t k, d, held = 0, place
    for k in range(top_k):
        if rows[k] < 0:
            continue
        place = before + rank_of(share, experts[k])
        for d in range(held):
            if ranks[d] == place:
                break
        else:
            ranks[held] = <int32_t>place
            held += 1
    for d in range(held, most):
        ranks[d] = -1


def dispatch_ranks(
    Space space, Array topk_idx, Array token_rows, num_experts, num_ranks, Array ranks, int32_t chunks=1
):
    cdef Share share = share_of(num_experts, num_ranks)
    cdef int64_t K = topk_idx.dims[1], D = ranks.dims[1], T = topk_idx.dims[0], token, before
    cdef const int32_t* experts = <const int32_t*>topk_idx.data
    cdef const int32_t* rows = <const int32_t*>token_rows.data
    cdef int32_t* out = <int32_t*>ranks.data
    cdef int threads = num_threads()
    for token in prange(T, nogil=True, num_threads=threads, schedule="static"):
        before = ((token + 1) * chunks - 1) // T * share.num_ranks
        find_ranks(&share, K, D, before, experts + token * K, rows + token * K, out + token * D)


# --- what goes with a token ---

cdef struct Slots:
    Share share
    int64_t top_k
    int64_t most_ranks  # D
    int64_t num_slots  # S
    int64_t chunks
    int64_t width  # bytes of a weight
    const int32_t* topk_idx
    const char* topk_weights
    const int32_t* token_rows
    const int32_t* ranks
    const int32_t* send_rows
    int32_t* slot_experts
    char* slot_weights
    int32_t* pair_slots


cdef void clear_slots(const Slots* job, int64_t row) noexcept nogil:
    cdef int64_t s
    for s in range(row * job.num_slots, (row + 1) * job.num_slots):
        job.slot_experts[s] = -1
    memset(job.slot_weights + row * job.num_slots * job.width, 0, job.num_slots * job.width)


cdef void fill_slots(const Slots* job, int64_t token) noexcept nogil:
    cdef int64_t d, k, pair, row, slot, rank, chunk, i
    for k in range(token * job.top_k, (token + 1) * job.top_k):
        job.pair_slots[k] = -1
    for d in range(token * job.most_ranks, (token + 1) * job.most_ranks):
        row = job.send_rows[d]
        if row < 0:
            continue
        clear_slots(job, row)
        slot = row * job.num_slots
        rank = job.ranks[d] % job.share.num_ranks
        chunk = job.ranks[d] // job.share.num_ranks
        for k in range(job.top_k):
            pair = token * job.top_k + k
            if job.token_rows[pair] < 0 or rank_of(&job.share, job.topk_idx[pair]) != rank:
                continue
            job.pair_slots[pair] = <int32_t>slot
            job.slot_experts[slot] = <int32_t>(
                (job.topk_idx[pair] - first_expert(&job.share, rank)) * job.chunks + chunk
            )
            for i in range(job.width):
                job.slot_weights[slot * job.width + i] = job.topk_weights[pair * job.width + i]
            slot = slot + 1


def dispatch_slots(
    Space space, Array topk_idx, Array topk_weights, Array token_rows, Array expert_offsets, Array ranks,
    Array send_rows, Array send_offsets, Array slot_experts, Array slot_weights, Array pair_slots, Array counts,
    int32_t chunks=1,
):
    cdef int64_t E = expert_offsets.dims[0] - 1, P = (send_offsets.dims[0] - 1) // chunks
    cdef int64_t token, rank, row, chunk, place
    cdef int64_t num_tokens = topk_idx.dims[0], most_rows = slot_experts.dims[0]
    cdef const int32_t* offsets = <const int32_t*>expert_offsets.data
    cdef const int32_t* starts = <const int32_t*>send_offsets.data
    cdef int32_t* count = <int32_t*>counts.data
    cdef Slots job
    job.share = share_of(E, P)
    job.top_k = topk_idx.dims[1]
    job.most_ranks = ranks.dims[1]
    job.num_slots = slot_experts.dims[1]
    job.chunks = chunks
    job.width = itemsize(topk_weights.dtype)
    job.topk_idx = <const int32_t*>topk_idx.data
    job.topk_weights = topk_weights.data
    job.token_rows = <const int32_t*>token_rows.data
    job.ranks = <const int32_t*>ranks.data
    job.send_rows = <const int32_t*>send_rows.data
    job.slot_experts = <int32_t*>slot_experts.data
    job.slot_weights = slot_weights.data
    job.pair_slots = <int32_t*>pair_slots.data
    cdef int threads = num_threads()
    for token in prange(num_tokens, nogil=True, num_threads=threads, schedule="static"):
        fill_slots(&job, token)
    for row in range(starts[P * chunks], most_rows):
        clear_slots(&job, row)
    for rank in range(P):
        for chunk in range(chunks):
            place = chunk * P + rank
            count[rank * (chunks + 1) + chunk] = starts[place + 1] - starts[place]
        count[rank * (chunks + 1) + chunks] = (
            offsets[first_expert(&job.share, rank + 1)] - offsets[first_expert(&job.share, rank)]
        )
