"""Rows in the order of their experts: the stable counting sort, the gather, and the gather-and-sum."""

from cython.parallel cimport prange
from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport qsort
from libc.string cimport memcpy, memset

from ..arrays cimport FLOAT64, Array, Space, itemsize
from .blas cimport real
from .convert cimport load, store
from .products cimport zero
from .threads cimport num_threads
from .tiles cimport Scratch, block_start, scratch
from .vector cimport axpy

cdef enum:
    SORT_SLOTS = 4096  # slots a unit of the counting sort looks at, at least
    SORT_UNITS = 64  # units, at most
    COMBINE_COLUMNS = 512  # columns summed at a time: their float32 sums stay in the first-level cache


# --- sort ---

cdef struct Sort:
    const int32_t* topk_idx
    int64_t slots  # R = T*K; slot t*K + k is expert k of token t
    int64_t num_experts
    int64_t units
    int64_t* counts  # [units, E]: rows of the unit, later where its rows start in `order`
    int32_t* order  # slots by expert, each expert's in slot order


cdef void count_unit(const Sort* job, int64_t unit, int32_t* token_rows) noexcept nogil:
    cdef int64_t slot
    cdef int32_t expert
    cdef int64_t* counts = job.counts + unit * job.num_experts
    memset(counts, 0, job.num_experts * sizeof(int64_t))
    for slot in range(block_start(job.slots, job.units, unit), block_start(job.slots, job.units, unit + 1)):
        expert = job.topk_idx[slot]
        token_rows[slot] = -1
        if 0 <= expert < job.num_experts:
            counts[expert] += 1


cdef void place_unit(const Sort* job, int64_t unit) noexcept nogil:
    cdef int64_t slot
    cdef int32_t expert
    cdef int64_t* starts = job.counts + unit * job.num_experts
    for slot in range(block_start(job.slots, job.units, unit), block_start(job.slots, job.units, unit + 1)):
        expert = job.topk_idx[slot]
        if 0 <= expert < job.num_experts:
            job.order[starts[expert]] = <int32_t>slot
            starts[expert] += 1


cdef struct Heavy:
    double weight
    int32_t slot


cdef int heavier_first(const void* a, const void* b) noexcept nogil:
    cdef const Heavy* x = <const Heavy*>a
    cdef const Heavy* y = <const Heavy*>b
    if x.weight != y.weight:
        return -1 if x.weight > y.weight else 1
    return -1 if x.slot < y.slot else 1


cdef int earlier_first(const void* a, const void* b) noexcept nogil:
    return -1 if (<const int32_t*>a)[0] < (<const int32_t*>b)[0] else 1


cdef void keep_heaviest(
    int32_t* slots, int64_t size, int64_t capacity, const char* weights, bint wide, Heavy* heavy
) noexcept nogil:
    """Move an expert's ``capacity`` heaviest slots to the front, in slot order; NaN is the lightest."""
    cdef int64_t i
    cdef double weight
    for i in range(size):
        weight = (<const double*>weights)[slots[i]] if wide else (<const float*>weights)[slots[i]]
        heavy[i].weight = weight if weight == weight else -INFINITY
        heavy[i].slot = slots[i]
    qsort(heavy, size, sizeof(Heavy), heavier_first)
    for i in range(capacity):
        slots[i] = heavy[i].slot
    qsort(slots, capacity, sizeof(int32_t), earlier_first)


cdef void write_rows(
    const int32_t* slots, int64_t first, int64_t size, int64_t top_k, const char* weights, int64_t width,
    int32_t* row_token, char* row_weights, int32_t* token_rows,
) noexcept nogil:
    cdef int64_t i
    for i in range(size):
        row_token[first + i] = <int32_t>(slots[i] // top_k)
        memcpy(row_weights + (first + i) * width, weights + slots[i] * width, width)
        token_rows[slots[i]] = <int32_t>(first + i)


def sort(
    Space space, Array topk_idx, Array topk_weights, capacity, str drop_policy,
    Array expert_offsets, Array row_token, Array row_weights, Array token_rows,
):
    cdef Sort job
    cdef int64_t top_k = topk_idx.dims[1], limit = capacity
    cdef bint by_weight = drop_policy == "probs", wide = topk_weights.dtype == FLOAT64
    cdef int64_t width = itemsize(topk_weights.dtype)
    job.topk_idx = <const int32_t*>topk_idx.data
    job.slots = topk_idx.dims[0] * top_k
    job.num_experts = expert_offsets.dims[0] - 1
    job.units = max(1, min(<int64_t>SORT_UNITS, job.slots // SORT_SLOTS))
    cdef int64_t E = job.num_experts, e, unit, units = job.units
    cdef Scratch counts = scratch(units * E * sizeof(int64_t))
    cdef Scratch starts = scratch((E + 1) * sizeof(int64_t))  # of the experts in `order`, before dropping
    cdef Scratch order = scratch(job.slots * sizeof(int32_t))
    cdef Scratch heavy = scratch(job.slots * sizeof(Heavy) if by_weight and limit >= 0 else 0)
    job.counts = <int64_t*>counts.data
    job.order = <int32_t*>order.data
    cdef int64_t* start = <int64_t*>starts.data
    cdef int32_t* offsets = <int32_t*>expert_offsets.data
    cdef int32_t* rows_of_tokens = <int32_t*>token_rows.data
    cdef int32_t* tokens = <int32_t*>row_token.data
    cdef Heavy* weighed = <Heavy*>heavy.data
    cdef int threads = num_threads()
    cdef int64_t size, total = 0, kept = 0
    cdef int64_t* count

    for unit in prange(units, nogil=True, num_threads=threads, schedule="static"):
        count_unit(&job, unit, rows_of_tokens)
    for e in range(E):
        start[e] = total
        offsets[e] = <int32_t>kept
        for unit in range(units):
            count = job.counts + unit * E + e
            size = count[0]
            count[0] = total
            total += size
        size = total - start[e]
        kept += size if limit < 0 else min(size, limit)
    start[E] = total
    offsets[E] = <int32_t>kept
    for unit in prange(units, nogil=True, num_threads=threads, schedule="static"):
        place_unit(&job, unit)
    for e in prange(E, nogil=True, num_threads=threads, schedule="dynamic"):
        if by_weight and start[e + 1] - start[e] > offsets[e + 1] - offsets[e]:
            keep_heaviest(
                job.order + start[e], start[e + 1] - start[e], limit, topk_weights.data, wide,
                weighed + start[e],
            )
        write_rows(
            job.order + start[e], offsets[e], offsets[e + 1] - offsets[e], top_k, topk_weights.data, width,
            tokens, row_weights.data, rows_of_tokens,
        )
    zero(<char*>(tokens + kept), (job.slots - kept) * sizeof(int32_t))
    zero(row_weights.data + kept * width, (job.slots - kept) * width)


# --- permute ---

def permute(Space space, Array x, Array row_token, Array expert_offsets, Array out):
    cdef int64_t row_bytes = x.dims[1] * itemsize(x.dtype), r
    cdef int64_t num_rows = (<const int32_t*>expert_offsets.data)[expert_offsets.dims[0] - 1]
    cdef int64_t num_tokens = x.dims[0]
    cdef const int32_t* tokens = <const int32_t*>row_token.data
    cdef int threads = num_threads()
    num_rows = max(<int64_t>0, min(num_rows, out.dims[0]))
    for r in prange(num_rows, nogil=True, num_threads=threads, schedule="static"):
        if 0 <= tokens[r] < num_tokens:
            memcpy(out.data + r * row_bytes, x.data + tokens[r] * row_bytes, row_bytes)
        else:
            memset(out.data + r * row_bytes, 0, row_bytes)
    zero(out.data + num_rows * row_bytes, (out.dims[0] - num_rows) * row_bytes)


# --- combine ---

cdef struct Combine:
    const char* rows
    const int32_t* token_rows
    const char* added  # or NULL
    char* out
    int64_t num_rows
    int64_t top_k
    int64_t hidden
    int dtype
    int itemsize


cdef void combine_token(const Combine* job, int64_t token, const real* weights) noexcept nogil:
    cdef real[COMBINE_COLUMNS] sums
    cdef real[COMBINE_COLUMNS] row
    cdef int64_t column = 0, columns, k
    cdef const int32_t* indices = job.token_rows + token * job.top_k
    cdef const char* source
    while column < job.hidden:
        columns = min(<int64_t>COMBINE_COLUMNS, job.hidden - column)
        if job.added == NULL:
            memset(sums, 0, columns * sizeof(real))
        else:
            load(job.dtype, columns, job.added + (token * job.hidden + column) * job.itemsize, sums)
        for k in range(job.top_k):
            if not 0 <= indices[k] < job.num_rows:
                continue
            source = job.rows + (indices[k] * job.hidden + column) * job.itemsize
            if job.itemsize < <int>sizeof(real):
                load(job.dtype, columns, source, row)
                source = <const char*>row
            axpy(columns, weights[token * job.top_k + k] if weights != NULL else 1, <const real*>source, sums)
        store(job.dtype, columns, sums, job.out + (token * job.hidden + column) * job.itemsize)
        column += columns


def combine(Space space, Array rows, Array token_rows, Array weights, Array out, Array added=None):
    cdef Combine job
    job.rows = rows.data
    job.token_rows = <const int32_t*>token_rows.data
    job.added = NULL
    if added is not None:
        job.added = added.data
    job.out = out.data
    job.num_rows = rows.dims[0]
    job.top_k = token_rows.dims[1]
    job.hidden = rows.dims[1]
    job.dtype = rows.dtype
    job.itemsize = itemsize(rows.dtype)
    cdef const char* w = NULL
    if weights is not None:
        w = weights.data
    cdef int64_t token, num_tokens = out.dims[0]
    cdef bint double_precision = rows.dtype == FLOAT64
    cdef int threads = num_threads()
    for token in prange(num_tokens, nogil=True, num_threads=threads, schedule="static"):
        if double_precision:
            combine_token(&job, token, <const double*>w)
        else:
            combine_token(&job, token, <const float*>w)
