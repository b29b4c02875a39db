"""The router: logits, scores, the choice of experts, weights, losses, and the way back.

Per token, with logits l over the experts:
    softmax gating: s = softmax(l), q = s          sigmoid gating: s = sigmoid(l), q = s / sum(s)
    aux loss = coeff * E * sum_e f_e mean_t(q_te)  z loss = coeff * mean_t(logsumexp(l_t)^2)
Tokens are taken in blocks cut by their number alone; sums over tokens go by block, then over blocks in order,
so that they have the same bits at any thread count.
"""

from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY, exp, fabs, log, log1p
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memset

from ..arrays cimport FLOAT64, Array, Space
from .blas cimport real
from .products cimport rows_product, rows_wgrad
from .threads cimport num_threads
from .tiles cimport Scratch, block_start, blocks, scratch
from .vector cimport exp_shifted, sigmoid

from .permute import combine, sort

cdef enum:
    BLOCK_TOKENS = 64  # tokens of a block, at least
    MOST_BLOCKS = 256


# --- the gate's products: one group of all tokens ---

def gate_logits(Space space, Array x, Array gate_weight, Array logits):
    cdef int32_t[2] offsets = [0, <int32_t>x.dims[0]]
    rows_product(x, NULL, gate_weight, offsets, 1, True, logits, False)


def gate_backward(
    Space space, Array dlogits, Array x, Array gate_weight, Array rows, Array token_rows, Array dx,
    Array dgate_weight, Array topk_idx=None,
):
    cdef int32_t[2] offsets = [0, <int32_t>x.dims[0]]
    cdef Array whole = dlogits if topk_idx is None else spread(space, dlogits, topk_idx, gate_weight.dims[0])
    if rows is not None:
        combine(space, rows, token_rows, None, dx)
    if dx is not None:
        rows_product(whole, NULL, gate_weight, offsets, 1, False, dx, rows is not None)
    if dgate_weight is not None:
        rows_wgrad(whole, NULL, x, NULL, offsets, 1, dgate_weight, False, 1)


cdef void spread_row(const real* chosen, const int32_t* experts, int64_t E, int64_t K, real* out) noexcept nogil:
    cdef int64_t k
    memset(out, 0, E * sizeof(real))
    for k in range(K):
        if 0 <= experts[k] < E:
            out[experts[k]] = chosen[k]


cdef Array spread(Space space, Array chosen, Array topk_idx, int64_t num_experts):
    """[T, E] from the chosen experts' [T, K]: zeros elsewhere."""
    cdef int64_t T = chosen.dims[0], K = chosen.dims[1], t
    cdef Array out = space.empty((T, num_experts), chosen.dtype)
    cdef const int32_t* experts = <const int32_t*>topk_idx.data
    cdef void* source = chosen.data
    cdef void* to = out.data
    cdef bint double_precision = chosen.dtype == FLOAT64
    for t in prange(T, nogil=True, num_threads=num_threads()):
        if double_precision:
            spread_row(<double*>source + t * K, experts + t * K, num_experts, K, <double*>to + t * num_experts)
        else:
            spread_row(<float*>source + t * K, experts + t * K, num_experts, K, <float*>to + t * num_experts)
    return out


# --- what both directions share ---

cdef struct Router:
    int64_t num_tokens
    int64_t num_experts
    int64_t top_k
    int64_t num_groups  # 0: no groups
    int64_t topk_groups
    int64_t num_blocks
    bint sigmoid
    bint normalise
    double scale
    double aux_coeff
    double z_coeff


cdef struct Desk:
    # What a thread needs to work on one token: four rows over the experts, and the best so far.
    char* scores
    char* other
    char* best
    double* weights
    int32_t* names
    uint8_t* open_groups


cdef Router router_of(config, Array topk_idx):
    cdef Router out
    out.num_tokens = topk_idx.dims[0]
    out.num_experts = config.num_experts
    out.top_k = topk_idx.dims[1]
    out.num_groups = config.num_expert_groups or 0
    out.topk_groups = config.topk_groups or 0
    out.num_blocks = min(<int64_t>MOST_BLOCKS, blocks(out.num_tokens, BLOCK_TOKENS))
    out.sigmoid = config.gating == "sigmoid"
    out.normalise = config.norm_topk_prob
    out.scale = config.routed_scaling_factor
    out.aux_coeff = config.aux_loss_coeff
    out.z_coeff = config.z_loss_coeff
    return out


cdef inline int64_t desk_bytes(int64_t num_experts) noexcept nogil:
    return blocks(num_experts * (4 * sizeof(double) + sizeof(int32_t) + sizeof(uint8_t)), 64) * 64


cdef inline Desk desk_at(char* memory, int64_t num_experts) noexcept nogil:
    cdef Desk out
    cdef int64_t row = num_experts * sizeof(double)
    out.scores = memory
    out.other = memory + row
    out.best = memory + 2 * row
    out.weights = <double*>(memory + 3 * row)
    out.names = <int32_t*>(memory + 4 * row)
    out.open_groups = <uint8_t*>(out.names + num_experts)
    return out


cdef inline double log_sigmoid(double x) noexcept nogil:
    return (x if x < 0 else 0) - log1p(exp(-fabs(x)))


cdef inline real largest(int64_t n, const real* x) noexcept nogil:
    cdef real top = x[0]
    cdef int64_t i
    for i in range(1, n):
        if x[i] > top:
            top = x[i]
    return top


cdef inline double softmax(int64_t n, const real* x, real* out) noexcept nogil:
    """``out`` = softmax(x); returns logsumexp(x)."""
    cdef real top = largest(n, x)
    cdef real total = exp_shifted(n, x, top, out)
    cdef int64_t i
    for i in range(n):
        out[i] /= total
    return top + log(<double>total)


# --- choice ---

cdef inline real ranked(real value) noexcept nogil:
    """NaN ranks with -inf."""
    return value if value == value else <real>(-INFINITY)


cdef inline int64_t insert(
    int64_t held, int64_t most, real value, int32_t name, real* best, int32_t* names
) noexcept nogil:
    """Into the ``most`` largest so far, in falling order; of equals the earlier stays first."""
    cdef int64_t at
    if held < most:
        at = held
        held += 1
    elif value > best[most - 1]:
        at = most - 1
    else:
        return held
    while at > 0 and value > best[at - 1]:
        best[at] = best[at - 1]
        names[at] = names[at - 1]
        at -= 1
    best[at] = value
    names[at] = name
    return held


cdef void open_best_groups(const Router* router, const real* choice, real* best, Desk* desk) noexcept nogil:
    """A group is worth its two best choices together; ties go to the lower group."""
    cdef int64_t size = router.num_experts // router.num_groups, e, g, held = 0
    cdef real first, second, value
    for g in range(router.num_groups):
        first = second = <real>(-INFINITY)
        for e in range(g * size, (g + 1) * size):
            value = ranked(choice[e])
            if value > first:
                second = first
                first = value
            elif value > second:
                second = value
        if size > 1:
            first += second
        held = insert(held, router.topk_groups, ranked(first), <int32_t>g, best, desk.names)
        desk.open_groups[g] = 0
    for g in range(router.topk_groups):
        desk.open_groups[desk.names[g]] = 1


cdef void choose(
    const Router* router, const real* choice, real* best, Desk* desk, int32_t* experts
) noexcept nogil:
    """The top_k of ``choice`` in falling order, ties to the lower index, within the best groups."""
    cdef int64_t groups = max(<int64_t>1, router.num_groups), e, g, held = 0
    cdef int64_t size = router.num_experts // groups
    if router.num_groups > 0:
        open_best_groups(router, choice, best, desk)
    for g in range(groups):
        if router.num_groups > 0 and not desk.open_groups[g]:
            continue
        for e in range(g * size, (g + 1) * size):
            held = insert(held, router.top_k, ranked(choice[e]), <int32_t>e, best, experts)


# --- forward ---

cdef inline void normalised_weights(
    const Router* router, const real* logits, const int32_t* experts, double* weights
) noexcept nogil:
    """s / sum(s) over the selected: a softmax over their log-scores, which is never 0 / 0."""
    cdef int64_t k
    cdef double top, total = 0
    for k in range(router.top_k):
        weights[k] = log_sigmoid(logits[experts[k]]) if router.sigmoid else logits[experts[k]]
    top = largest(router.top_k, weights)
    for k in range(router.top_k):
        weights[k] = exp(weights[k] - top)
        total += weights[k]
    for k in range(router.top_k):
        weights[k] /= total


cdef struct Route:
    Router router
    const char* logits
    const float* expert_bias
    const uint8_t* valid_mask
    int32_t* topk_idx
    char* topk_weights
    double* losses  # [blocks, 2]: sums of logsumexp^2 and of the entropy
    double* scores  # [blocks, E]: sums of q
    int32_t* counts  # [blocks, E]


# Below this sum of sigmoids each is exp(logit) to the last bit, and their shares are the softmax of the logits:
# which still has digits where float32 sigmoids have lost theirs.
cdef double VANISHED = 1e-30


cdef inline double entropy(
    const Router* router, const real* logits, const real* q, double lse
) noexcept nogil:
    """-sum q log q; a q of 0 adds nothing."""
    cdef double total = 0
    cdef int64_t e
    for e in range(router.num_experts):
        if q[e] != 0:
            total += q[e] * (-log(<double>q[e]) if router.sigmoid else lse - logits[e])
    return total


cdef void route_token(
    const Route* job, int64_t token, const real* logits, real* scores, real* choice, real* best, Desk* desk,
    double* losses, double* score_sums, int32_t* counts,
) noexcept nogil:
    cdef const Router* router = &job.router
    cdef int64_t E = router.num_experts, K = router.top_k, e, k
    cdef int32_t* experts = job.topk_idx + token * K
    cdef real* weights = <real*>job.topk_weights + token * K
    cdef double total = 0
    cdef double lse = softmax(E, logits, scores)
    if router.sigmoid:
        sigmoid(E, logits, scores)
    if job.expert_bias == NULL and router.num_groups == 0:
        # a score rises with its logit, but has fewer distinct values
        choose(router, logits, best, desk, experts)
    else:
        for e in range(E):
            choice[e] = scores[e] + (job.expert_bias[e] if job.expert_bias != NULL else 0)
        choose(router, <const real*>choice, best, desk, experts)
    if router.normalise:
        normalised_weights(router, logits, experts, desk.weights)
    for k in range(K):
        weights[k] = <real>((desk.weights[k] if router.normalise else scores[experts[k]]) * router.scale)
        counts[experts[k]] += 1

    if router.sigmoid:
        for e in range(E):
            total += scores[e]
        if total < VANISHED:
            softmax(E, logits, scores)
        else:
            for e in range(E):
                scores[e] = <real>(scores[e] / total)
    for e in range(E):
        score_sums[e] += scores[e]
    losses[0] += lse * lse
    losses[1] += entropy(router, logits, <const real*>scores, lse)


cdef void route_block(const Route* job, int64_t index, Desk desk, real* scores) noexcept nogil:
    cdef int64_t E = job.router.num_experts, K = job.router.top_k, count = job.router.num_blocks, token, k
    memset(job.losses + 2 * index, 0, 2 * sizeof(double))
    memset(job.scores + index * E, 0, E * sizeof(double))
    memset(job.counts + index * E, 0, E * sizeof(int32_t))
    for token in range(
        block_start(job.router.num_tokens, count, index), block_start(job.router.num_tokens, count, index + 1)
    ):
        if job.valid_mask != NULL and not job.valid_mask[token]:
            for k in range(token * K, (token + 1) * K):
                job.topk_idx[k] = -1
                (<real*>job.topk_weights)[k] = 0
        else:
            route_token(
                job, token, <const real*>job.logits + token * E,
                scores, <real*>desk.other, <real*>desk.best, &desk,
                job.losses + 2 * index, job.scores + index * E, job.counts + index * E,
            )


cdef inline void write_losses(
    const Router* router, const double* sums, const int32_t* rows, real* losses
) noexcept nogil:
    """From rows of each expert and from ``sums``: of q by expert, of logsumexp^2 and of the entropy."""
    cdef int64_t E = router.num_experts, e, total_rows = 0
    cdef double tokens, aux = 0
    for e in range(E):
        total_rows += rows[e]
    if total_rows == 0:
        losses[0] = losses[1] = losses[2] = 0
        return
    tokens = <double>(total_rows // router.top_k)
    for e in range(E):
        aux += rows[e] / tokens * (sums[e] / tokens)
    losses[0] = <real>(aux * (router.aux_coeff * E))
    losses[1] = <real>(sums[E] * (router.z_coeff / tokens))
    losses[2] = <real>(sums[E + 1] / tokens)


def route(
    Space space, config, Array logits, Array expert_bias, Array valid_mask,
    Array topk_idx, Array topk_weights, Array tokens_per_expert, Array losses, Array sums,
):
    cdef Route job
    job.router = router_of(config, topk_idx)
    job.logits = logits.data
    job.expert_bias = NULL
    job.valid_mask = NULL
    if expert_bias is not None:
        job.expert_bias = <const float*>expert_bias.data
    if valid_mask is not None:
        job.valid_mask = <const uint8_t*>valid_mask.data
    job.topk_idx = <int32_t*>topk_idx.data
    job.topk_weights = topk_weights.data
    cdef int64_t E = job.router.num_experts, count = job.router.num_blocks, index, e
    cdef int threads = num_threads()
    cdef Scratch parts = scratch(count * (2 + E) * sizeof(double))
    cdef Scratch totals = scratch((E + 2) * sizeof(double) if sums is None else 0)
    cdef Scratch counts = scratch(count * E * sizeof(int32_t))
    cdef Scratch desks = scratch(threads * desk_bytes(E))
    cdef char* desk = desks.data
    job.losses = <double*>parts.data
    job.scores = job.losses + 2 * count
    job.counts = <int32_t*>counts.data
    cdef bint double_precision = logits.dtype == FLOAT64
    for index in prange(count, nogil=True, num_threads=threads, schedule="dynamic"):
        if double_precision:
            route_block(
                &job, index, desk_at(desk + threadid() * desk_bytes(E), E),
                <double*>(desk + threadid() * desk_bytes(E)),
            )
        else:
            route_block(
                &job, index, desk_at(desk + threadid() * desk_bytes(E), E),
                <float*>(desk + threadid() * desk_bytes(E)),
            )

    cdef int32_t* rows = <int32_t*>tokens_per_expert.data
    cdef double* total = <double*>(totals.data if sums is None else sums.data)
    for e in range(E + 2):
        total[e] = 0
    for e in range(E):
        rows[e] = 0
        for index in range(count):
            rows[e] += job.counts[index * E + e]
            total[e] += job.scores[index * E + e]
    for index in range(count):
        total[E] += job.losses[2 * index]
        total[E + 1] += job.losses[2 * index + 1]
    if double_precision:
        write_losses(&job.router, total, rows, <double*>losses.data)
    else:
        write_losses(&job.router, total, rows, <float*>losses.data)


def router_losses(Space space, config, Array sums, Array tokens_per_expert, Array losses):
    cdef Router router
    router.num_experts = tokens_per_expert.dims[0]
    router.top_k = config.top_k
    router.aux_coeff = config.aux_loss_coeff
    router.z_coeff = config.z_loss_coeff
    cdef const int32_t* rows = <const int32_t*>tokens_per_expert.data
    if losses.dtype == FLOAT64:
        write_losses(&router, <const double*>sums.data, rows, <double*>losses.data)
    else:
        write_losses(&router, <const double*>sums.data, rows, <float*>losses.data)


# --- backward ---

cdef struct RouteBackward:
    Router router
    const char* logits  # or NULL: softmax gating, normalised weights and no loss need none
    const int32_t* topk_idx
    const char* topk_weights
    const int32_t* token_rows
    const char* dp_rows
    char* dlogits
    double* dshares  # [E]: the aux loss's gradient with respect to q of any token
    bint sparse  # dlogits are the chosen experts' alone, [T, K]
    double dz  # the z loss's gradient with respect to any token's logsumexp^2
    bint has_aux


cdef inline void add_selected(
    const RouteBackward* job, const real* logits, const int32_t* experts, const real* weights,
    const int32_t* rows, real* d,
) noexcept nogil:
    """The gradient through the normalised weights of the selected experts, at their places in d."""
    cdef const Router* router = &job.router
    cdef const real* dp = <const real*>job.dp_rows
    cdef real scale = <real>router.scale  # as the weights have it: a single one is all of it
    cdef double dot = 0, value
    cdef int64_t k
    if scale == 0:
        return
    for k in range(router.top_k):
        if rows[k] >= 0:
            dot += <double>weights[k] / scale * dp[rows[k]]
    for k in range(router.top_k):
        value = weights[k] * ((dp[rows[k]] if rows[k] >= 0 else 0) - dot)
        if router.sigmoid:  # the weights are a softmax of log-sigmoids, whose slope is 1 - s
            value *= exp(log_sigmoid(-<double>logits[experts[k]]))
        d[k if job.sparse else experts[k]] += <real>value


cdef inline void add_sigmoids(
    const RouteBackward* job, const real* logits, const int32_t* experts, const int32_t* rows, real* d
) noexcept nogil:
    """The gradient through weights that are sigmoids, each by itself, where no other score has any."""
    cdef const real* dp = <const real*>job.dp_rows
    cdef double logit
    cdef int64_t k
    for k in range(job.router.top_k):
        if rows[k] >= 0:
            logit = logits[experts[k]]
            d[k] = <real>(job.router.scale * dp[rows[k]] * exp(log_sigmoid(logit) + log_sigmoid(-logit)))


cdef inline void add_scores(
    const RouteBackward* job, const real* logits, const int32_t* experts, const int32_t* rows,
    real* scores, real* dscores, real* d,
) noexcept nogil:
    """The gradient through every expert's score: of weights that are not normalised, and of the aux loss."""
    cdef const Router* router = &job.router
    cdef const real* dp = <const real*>job.dp_rows
    cdef int64_t E = router.num_experts, e, k
    cdef double dot = 0, total = 1
    if router.sigmoid:
        sigmoid(E, logits, scores)
        total = 0
        for e in range(E):
            total += scores[e]
    else:
        softmax(E, logits, scores)
    if total < VANISHED:
        softmax(E, logits, scores)
        for e in range(E):
            dot += scores[e] * job.dshares[e]
        for e in range(E):
            d[e] += <real>(scores[e] * (job.dshares[e] - dot))
        return  # scores that are 0 have no slope of their own
    for e in range(E):
        dot += scores[e] / total * job.dshares[e]
    for e in range(E):
        # q = s / total. A softmax sums to 1 already: its total of 1 takes no part, and what is subtracted
        # here would be below.
        dscores[e] = <real>((job.dshares[e] - dot) / total)
    if not router.normalise:
        for k in range(router.top_k):
            if rows[k] >= 0:
                dscores[experts[k]] += <real>(router.scale * dp[rows[k]])
    dot = 0
    if not router.sigmoid:
        for e in range(E):
            dot += scores[e] * dscores[e]
    for e in range(E):
        d[e] += <real>(scores[e] * ((1 - scores[e]) * dscores[e] if router.sigmoid else dscores[e] - dot))


cdef void route_backward_block(
    const RouteBackward* job, int64_t index, Desk desk, real* scores
) noexcept nogil:
    cdef const Router* router = &job.router
    cdef int64_t E = router.num_experts, K = router.top_k, token, e, width = K if job.sparse else E
    cdef const real* logits = NULL
    cdef real* d
    cdef double lse
    for token in range(
        block_start(router.num_tokens, router.num_blocks, index),
        block_start(router.num_tokens, router.num_blocks, index + 1),
    ):
        d = <real*>job.dlogits + token * width
        if job.logits != NULL:
            logits = <const real*>job.logits + token * E
        memset(d, 0, width * sizeof(real))
        if job.topk_idx[token * K] < 0:  # a token that valid_mask excludes
            continue
        if router.normalise:
            add_selected(
                job, logits, job.topk_idx + token * K, <const real*>job.topk_weights + token * K,
                job.token_rows + token * K, d,
            )
        if job.sparse and not router.normalise:
            add_sigmoids(job, logits, job.topk_idx + token * K, job.token_rows + token * K, d)
        elif job.has_aux or not router.normalise:
            add_scores(
                job, logits, job.topk_idx + token * K, job.token_rows + token * K,
                scores, <real*>desk.other, d,
            )
        if job.dz != 0:
            lse = softmax(E, logits, scores)
            for e in range(E):
                d[e] += <real>(job.dz * 2 * lse * scores[e])


def route_and_sort(
    Space space, config, Array logits, Array expert_bias, Array valid_mask, capacity,
    Array topk_idx, Array topk_weights, Array tokens_per_expert, Array losses, Array sums,
    Array expert_offsets, Array row_token, Array row_weights, Array token_rows,
):
    route(
        space, config, logits, expert_bias, valid_mask, topk_idx, topk_weights, tokens_per_expert, losses, sums
    )
    sort(
        space, topk_idx, topk_weights, capacity, config.drop_policy,
        expert_offsets, row_token, row_weights, token_rows,
    )


cdef double number_at(Array array, int index) noexcept:
    if array.dtype == FLOAT64:
        return (<double*>array.data)[index]
    return (<float*>array.data)[index]


def route_backward(
    Space space, config, Array logits, Array topk_idx, Array topk_weights, Array tokens_per_expert,
    Array token_rows, Array dp_rows, Array grad_losses, Array dlogits,
):
    cdef RouteBackward job
    job.router = router_of(config, topk_idx)
    job.logits = NULL
    if logits is not None:
        job.logits = logits.data
    job.topk_idx = <const int32_t*>topk_idx.data
    job.topk_weights = topk_weights.data
    job.token_rows = <const int32_t*>token_rows.data
    job.dp_rows = dp_rows.data
    job.dlogits = dlogits.data
    job.sparse = config.sparse_gradient
    cdef int64_t E = job.router.num_experts, count = job.router.num_blocks, index, e, total_rows = 0
    cdef bint double_precision = dlogits.dtype == FLOAT64
    cdef const int32_t* rows = <const int32_t*>tokens_per_expert.data
    cdef double daux = 0, tokens
    cdef Scratch dshares = scratch(E * sizeof(double))
    job.dshares = <double*>dshares.data
    job.dz = 0
    for e in range(E):
        total_rows += rows[e]
    tokens = <double>max(total_rows // job.router.top_k, 1)
    # a loss without a coefficient has no gradient, whatever it is multiplied by
    if grad_losses is not None and job.router.aux_coeff != 0:
        daux = job.router.aux_coeff * number_at(grad_losses, 0)
    if grad_losses is not None and job.router.z_coeff != 0:
        job.dz = job.router.z_coeff * number_at(grad_losses, 1) / tokens
    job.has_aux = daux != 0
    for e in range(E):
        job.dshares[e] = daux * E * (rows[e] / tokens) / tokens

    cdef int threads = num_threads()
    cdef Scratch desks = scratch(threads * desk_bytes(E))
    cdef char* desk = desks.data
    for index in prange(count, nogil=True, num_threads=threads, schedule="dynamic"):
        if double_precision:
            route_backward_block(
                &job, index, desk_at(desk + threadid() * desk_bytes(E), E),
                <double*>(desk + threadid() * desk_bytes(E)),
            )
        else:
            route_backward_block(
                &job, index, desk_at(desk + threadid() * desk_bytes(E), E),
                <float*>(desk + threadid() * desk_bytes(E)),
            )
