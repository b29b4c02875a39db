// The router: scores, the choice of experts, weights, and each block's counts and losses in one kernel; their
// sums, and the plan, in another. Of few tokens, and without losses, all in one. And its gradient.
//
// One warp takes a token, and its lane i the experts i, i + 32, i + 64, ...; what concerns chosen experts alone, it
// does for as many tokens at once as have room in its lanes.
//
// Compiled with -DW_TYPE= the router's type (float or double) and -DEXPERTS_PER_LANE= at least E / 32.
#include "common/dynamic_shared.cuh"
#include "common/launch_order.cuh"
#include "common/order.cuh"
#include "common/placement.cuh"
#include "common/types.cuh"
#include "common/warp.cuh"

using W = type_of<W_TYPE>;
using Key = key_of<W>;

constexpr int N = EXPERTS_PER_LANE;
// What a multiprocessor has registers for; the same as in ffmoe_core/cuda/routing.pyx.
constexpr int LANE_BYTES = N * int(sizeof(W));
constexpr int WARPS = LANE_BYTES <= 16 ? 32 : LANE_BYTES <= 32 ? 16 : 8;
constexpr int PLAN_THREADS = 1024;
constexpr int BACKWARD_WARPS = 8;

// The same as in ffmoe_core/cuda/routing.pyx.
struct Router {
    int64 num_tokens;
    int num_experts;
    int top_k;
    int num_groups;  // 0: no groups
    int topk_groups;
    int sigmoid;  // gating: 1 sigmoid, 0 softmax
    int normalise;
    double scale;
    double aux_coeff;
    double z_coeff;
};

__device__ __forceinline__ W minus_infinity() { return W(__int_as_float(0xff800000)); }

__device__ __forceinline__ W sigmoid(W x) {
    const W e = exp(-fabs(x));
    return (x >= 0 ? W(1) : e) / (1 + e);
}

__device__ __forceinline__ W log_sigmoid(W x) { return (x < 0 ? x : W(0)) - log1p(exp(-fabs(x))); }

// A token's logits; minus infinity, the score 0, where there is no expert.
__device__ __forceinline__ void load_logits(const W* logits, int num_experts, W (&out)[N]) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int e = lane + 32 * i;
        out[i] = e < num_experts ? logits[e] : minus_infinity();
    }
}

// What the exponentials of a softmax were relative to, and their sum.
struct Normaliser {
    W top;
    W sum;
};

// out = softmax(x).
__device__ __forceinline__ Normaliser softmax(const W (&x)[N], W (&out)[N]) {
    W top = x[0];
#pragma unroll
    for (int i = 1; i < N; i++) top = fmax(top, x[i]);
    top = number_of(warp_max(order_key(top)));  // as keys, one instruction compares all lanes'
    W sum = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
        out[i] = exp(x[i] - top);
        sum += out[i];
    }
    sum = warp_sum(sum);
    const W inverse = 1 / sum;
#pragma unroll
    for (int i = 0; i < N; i++) out[i] *= inverse;
    return {top, sum};
}

__device__ __forceinline__ void log_sigmoids(const W (&x)[N], W (&out)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = log_sigmoid(x[i]);
}

// --- choice ---

// The index of the largest key, the lower one of equals. Takes it out: its key becomes 0.
__device__ __forceinline__ int take_best(Key (&keys)[N]) {
    const int lane = threadIdx.x & 31;
    Key mine = keys[0];
    int index = lane;
#pragma unroll
    for (int i = 1; i < N; i++) {
        if (keys[i] > mine) {
            mine = keys[i];
            index = lane + 32 * i;
        }
    }
    const Key best = warp_max(mine);
    index = warp_min(mine == best ? index : 32 * N);
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (index == lane + 32 * i) keys[i] = 0;
    }
    return index;
}

// In place of a key's last bits, its index, the lower one greater: the largest of such keys says whose it is, and
// no two are equal. They rank as the keys do where those differ in other bits.
constexpr Key INDEX_BITS = 32 * N - 1;

// A lane's keys of that kind, in runs of RUN that are sorted: the largest is at the head of one, and to take it out
// moves no other.
struct Runs {
    static constexpr int RUN = N < 4 ? N : 4;
    Key keys[N];

    __device__ __forceinline__ explicit Runs(const Key (&whole)[N]) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int i = 0; i < N; i++) {
            keys[i] = (whole[i] & ~INDEX_BITS) | (INDEX_BITS - (lane + 32 * i));
#pragma unroll
            for (int j = i; j % RUN > 0; j--) {
                const Key a = keys[j - 1], b = keys[j];
                keys[j - 1] = a > b ? a : b;
                keys[j] = a > b ? b : a;
            }
        }
    }

    // The warp's largest. Takes it out.
    __device__ __forceinline__ Key take() {
        Key best = keys[0];
#pragma unroll
        for (int head = RUN; head < N; head += RUN) best = keys[head] > best ? keys[head] : best;
        best = warp_max(best);
#pragma unroll
        for (int head = 0; head < N; head += RUN) {
            if (keys[head] != best) continue;
#pragma unroll
            for (int i = head; i < head + RUN - 1; i++) keys[i] = keys[i + 1];
            keys[head + RUN - 1] = 0;
        }
        return best;
    }
};

// Takes out the `top_k` largest keys. The lane whose `place` is k gets the index of the k-th; those after the first
// 32 go to `indices`.
__device__ __forceinline__ int choose(Key (&keys)[N], int top_k, int place, int* indices) {
    const int lane = threadIdx.x & 31;
    const bool waits = place >= 0 && place < top_k;
    if (top_k <= 32) {
        Runs runs(keys);
        Key mine = 0;
        for (int k = 0; k < top_k; k++) {
            const Key best = runs.take();
            if (k == place) mine = best;
        }
        // is each of them larger than the next, by more than its index?
        const Key next = runs.take(), below = __shfl_down_sync(ALL_LANES, mine, 1);
        const Key differing = mine ^ (place < top_k - 1 ? below : next);
        if (!__any_sync(ALL_LANES, waits && differing <= INDEX_BITS)) return int(~mine & INDEX_BITS);
    }
    int mine = 0;
#pragma unroll 1
    for (int k = 0; k < top_k; k++) {
        const int index = take_best(keys);
        if (k == place) mine = index;
        if (k >= 32 && k % 32 == lane) indices[k] = index;
    }
    return mine;
}

// The key of the sum of a group's two largest choices.
__device__ __forceinline__ Key group_key(const Key (&keys)[N], int first_expert, int size) {
    const int lane = threadIdx.x & 31;
    Key largest = 0, second = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int e = lane + 32 * i;
        if (e < first_expert || e >= first_expert + size) continue;
        if (keys[i] > largest) {
            second = largest;
            largest = keys[i];
        } else if (keys[i] > second) {
            second = keys[i];
        }
    }
    const Key best = warp_max(largest);
    if (size == 1) return best;
    const int holder = warp_min(largest == best ? lane : 32);
    const Key next = warp_max(lane == holder ? second : largest);
    return order_key(number_of(best) + number_of(next));
}

// Takes out the experts of all but the best groups. Groups lie over the lanes as experts do.
__device__ __forceinline__ void keep_best_groups(const Router& router, Key (&keys)[N]) {
    const int lane = threadIdx.x & 31;
    const int size = router.num_experts / router.num_groups;
    Key groups[N] = {};
    for (int g = 0; g < router.num_groups; g++) {
        const Key key = group_key(keys, g * size, size);
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (g == lane + 32 * i) groups[i] = key;
        }
    }
    uint32 open = 0;
    for (int n = 0; n < router.topk_groups; n++) {
        const int first_expert = take_best(groups) * size;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int e = lane + 32 * i;
            if (e >= first_expert && e < first_expert + size) open |= 1u << i;
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (!(open >> i & 1)) keys[i] = 0;
    }
}

// Its experts in order of preference, as keys; q: the softmax of its logits l.
__device__ __forceinline__ void rank_experts(
    const Router& router, const W (&l)[N], const W (&q)[N], const float* expert_bias, Key (&keys)[N]
) {
    const int lane = threadIdx.x & 31;
    const bool by_logit = expert_bias == nullptr && router.num_groups == 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int e = lane + 32 * i;
        if (e >= router.num_experts) {
            keys[i] = 0;
        } else if (by_logit) {
            keys[i] = order_key(l[i]);
        } else {
            const W score = router.sigmoid ? sigmoid(l[i]) : q[i];
            keys[i] = order_key(score + (expert_bias != nullptr ? W(expert_bias[e]) : W(0)));
        }
    }
    if (router.num_groups > 0) keep_best_groups(router, keys);
}

// This lane's part of the entropy of its scores, which take the place of l's softmax q and, as logarithms, of l.
__device__ __forceinline__ W entropy_part(const Router& router, const Normaliser& by_logits, W (&l)[N], W (&q)[N]) {
    W top = by_logits.top, entropy = 0;
    if (router.sigmoid) {
        log_sigmoids(l, l);
        const Normaliser by_scores = softmax(l, q);
        top = by_scores.top;
        if ((threadIdx.x & 31) == 0) entropy += log(by_scores.sum);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        // -q log q, but for the sum's logarithm; a score of 0 adds nothing, NaN does
        if (q[i] != 0) entropy += q[i] * (top - l[i]);
    }
    return entropy;
}

// --- forward ---

// What the blocks of `route` add up, each for its tokens, and what becomes of it.
struct Sums {
    W* scores;    // [blocks, E]
    int* counts;  // [blocks, E]
    W* losses;    // [blocks, 2]: z-loss and entropy
    int* tokens_per_expert;
    W* results;  // [3]
    double* totals;  // [E + 2], or NULL: of q by expert, of logsumexp^2 and of the entropy
};

// The losses from what was added up, by the lanes of a warp.
__device__ __forceinline__ void write_losses(
    const Router& router, const double* scores, const int* tokens_per_expert, double z, double entropy, W* losses
) {
    double balance = 0, rows = 0;
    for (int e = threadIdx.x & 31; e < router.num_experts; e += 32) {
        rows += tokens_per_expert[e];
        balance += tokens_per_expert[e] * scores[e];
    }
    const double valid = warp_sum(rows) / router.top_k;
    balance = warp_sum(balance);
    if ((threadIdx.x & 31) == 0) {
        losses[0] = valid > 0 ? W(router.aux_coeff * router.num_experts * (balance / valid / valid)) : W(0);
        losses[1] = valid > 0 ? W(router.z_coeff * (z / valid)) : W(0);
        losses[2] = valid > 0 ? W(entropy / valid) : W(0);
    }
}

// Adds up the blocks' sums, in an order that the number of threads does not change.
template <int THREADS> __device__ void add_up(const Router& router, const Sums& sums, int blocks) {
    constexpr int SLICES = 8;  // warps that share the blocks' sums of 32 experts
    constexpr int COLUMNS = THREADS / 32 / SLICES * 32;
    __shared__ double scores[MAX_EXPERTS], slice_scores[THREADS / 32][32];
    __shared__ int slice_counts[THREADS / 32][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, slice = warp % SLICES;
    const int num_experts = router.num_experts;
    for (int first = 0; first < num_experts; first += COLUMNS) {
        const int e = first + warp / SLICES * 32 + lane;
        double score = 0;
        int count = 0;
        if (e < num_experts) {
#pragma unroll 8
            for (int row = slice; row < blocks; row += SLICES) {
                const int64 at = int64(row) * num_experts + e;
                score += sums.scores[at];
                count += sums.counts[at];
            }
        }
        slice_scores[warp][lane] = score;
        slice_counts[warp][lane] = count;
        __syncthreads();
        if (slice == 0 && e < num_experts) {
            for (int s = 1; s < SLICES; s++) {
                score += slice_scores[warp + s][lane];
                count += slice_counts[warp + s][lane];
            }
            scores[e] = score;
            if (sums.totals != nullptr) sums.totals[e] = score;
            sums.tokens_per_expert[e] = count;
        }
        __syncthreads();
    }
    if (warp > 0) return;
    double z = 0, entropy = 0;
    for (int row = lane; row < blocks; row += 32) {
        z += sums.losses[2 * row];
        entropy += sums.losses[2 * row + 1];
    }
    z = warp_sum(z);
    entropy = warp_sum(entropy);
    if (lane == 0 && sums.totals != nullptr) {
        sums.totals[num_experts] = z;
        sums.totals[num_experts + 1] = entropy;
    }
    write_losses(router, scores, sums.tokens_per_expert, z, entropy, sums.results);
}

// A block takes `slots.chunk` / K tokens; `route_plan` adds up their sums and makes the plan.
extern "C" __global__ void __launch_bounds__(32 * WARPS) route(
    const Router router, const Slots slots, const W* logits, const float* expert_bias,
    const unsigned char* valid_mask, int* topk_idx, W* topk_weights, const Sums sums
) {
    after_earlier_kernels();
    W* warp_scores = reinterpret_cast<W*>(dynamic_shared<8>());  // [WARPS, E]
    __shared__ int block_counts[32 * N];
    __shared__ W warp_losses[WARPS][2];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int num_experts = router.num_experts, top_k = router.top_k;
    for (int e = threadIdx.x; e < num_experts; e += 32 * WARPS) block_counts[e] = 0;
    __syncthreads();

    const int block_tokens = int(slots.chunk / top_k);
    const int64 begin = int64(blockIdx.x) * block_tokens;
    const int tokens = int(min(int64(block_tokens), router.num_tokens - begin));
    // A warp takes its tokens in batches. Each of a batch has a span of the lanes: one for each of its choices, of
    // the first 32.
    int span = 1;
    while (span < min(top_k, 32)) span *= 2;
    const int owner = lane / span, place = lane & (span - 1);
    const int share = (block_tokens + WARPS - 1) / WARPS, batches = (share * span + 31) / 32;
    const int batch = (share + batches - 1) / batches;

    W q_sums[N] = {};
    W z_sum = 0, entropy_sum = 0;  // of this lane's tokens, or experts
    for (int first = warp * batch; first < tokens; first += WARPS * batch) {
        // of the lane's token, with the expert at the lane's place, or -1 where the token is left out
        Normaliser full = {};
        int chosen = -1;
        for (int i = 0; i < min(batch, tokens - first); i++) {
            const int64 t = begin + first + i;
            if (valid_mask != nullptr && !valid_mask[t]) {
#pragma unroll 1
                for (int k = lane; k < top_k; k += 32) {
                    topk_idx[t * top_k + k] = -1;
                    topk_weights[t * top_k + k] = 0;
                }
                continue;
            }
            W l[N], q[N];
            load_logits(logits + t * num_experts, num_experts, l);
            const Normaliser by_logits = softmax(l, q);

            Key keys[N];
            rank_experts(router, l, q, expert_bias, keys);
            const int expert = choose(keys, top_k, owner == i ? place : -1, topk_idx + t * top_k);
            if (owner == i) {
                chosen = expert;
                full = by_logits;
            }

            entropy_sum += entropy_part(router, by_logits, l, q);
#pragma unroll
            for (int i = 0; i < N; i++) q_sums[i] += q[i];
        }

        // Weights, and what else is the same for every expert of a token, for the whole batch.
        const int64 t = begin + first + owner;
        const W* token_logits = logits + t * num_experts;
        int* experts = topk_idx + t * top_k;
        W* weights = topk_weights + t * top_k;
        const int places = chosen >= 0 ? top_k : 0;
        const W chosen_logit = place < places ? token_logits[chosen] : W(0);
        const auto for_each = [&](const auto& body) {
#pragma unroll 1
            for (int k = place; k < places; k += 32) {
                const int e = k < 32 ? chosen : experts[k];
                body(k, e, k < 32 ? chosen_logit : token_logits[e]);
            }
        };
        const auto score = [&](W logit) { return router.sigmoid ? log_sigmoid(logit) : logit; };
        W top = minus_infinity(), sum = 0;
        if (router.normalise) {
            for_each([&](int, int, W logit) { top = fmax(top, score(logit)); });
            top = warp_max(top, span);
            for_each([&](int, int, W logit) { sum += exp(score(logit) - top); });
            sum = warp_sum(sum, span);
        }
        for_each([&](int k, int e, W logit) {
            const W weight = router.normalise ? exp(score(logit) - top) / sum
                : router.sigmoid              ? sigmoid(logit)
                                              : exp(logit - full.top) / full.sum;
            experts[k] = e;
            weights[k] = weight * W(router.scale);
            atomicAdd(&block_counts[e], 1);
        });
        if (place == 0 && places > 0) {
            const W log_sum = log(full.sum), lse = full.top + log_sum;
            z_sum += lse * lse;
            if (!router.sigmoid) entropy_sum += log_sum;
        }
    }

    z_sum = warp_sum(z_sum);
    entropy_sum = warp_sum(entropy_sum);
    if (lane == 0) {
        warp_losses[warp][0] = z_sum;
        warp_losses[warp][1] = entropy_sum;
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int e = lane + 32 * i;
        if (e < num_experts) warp_scores[warp * num_experts + e] = q_sums[i];
    }
    __syncthreads();
    const int64 row = int64(blockIdx.x) * num_experts;
    for (int e = threadIdx.x; e < num_experts; e += 32 * WARPS) {
        W score = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) score += warp_scores[w * num_experts + e];
        sums.scores[row + e] = score;
        sums.counts[row + e] = block_counts[e];
    }
    if (threadIdx.x < 2) {
        W sum = 0;
        for (int w = 0; w < WARPS; w++) sum += warp_losses[w][threadIdx.x];
        sums.losses[2 * blockIdx.x + threadIdx.x] = sum;
    }
}

// Block c makes the plan of chunk c; the last block adds up the sums, and is the only one where no plan is
// wanted.
extern "C" __global__ void __launch_bounds__(PLAN_THREADS, 1) route_plan(
    const Router router, const Slots slots, const int* topk_idx, const W* topk_weights, const Sums sums,
    const Plan<W> plan
) {
    after_earlier_kernels();
    if (blockIdx.x == gridDim.x - 1) return add_up<PLAN_THREADS>(router, sums, slots.chunks);
    place_chunk<PLAN_THREADS>(slots, blockIdx.x, topk_idx, topk_weights, sums.counts, plan, dynamic_shared<8>());
}

// Few tokens, no more pairs than FEW, no losses and no bound on an expert's rows: all in one block. A pair's row is the
// number of pairs that come before it, which are few enough to be counted. plan.expert_offsets may be NULL: no plan.
constexpr int FEW = 256;  // the same as in ffmoe_core/cuda/routing.pyx
constexpr uint32 NO_EXPERT = ~0u;

extern "C" __global__ void __launch_bounds__(32 * WARPS) route_few(
    const Router router, const W* logits, const float* expert_bias, const unsigned char* valid_mask, int* topk_idx,
    W* topk_weights, int* tokens_per_expert, W* losses, const Plan<W> plan
) {
    after_earlier_kernels();
    __shared__ __align__(16) uint32 keys_of_pairs[FEW];  // they rank by expert, then as the pairs do
    __shared__ W weights_of_pairs[FEW];
    __shared__ int starts[MAX_EXPERTS + 1];
    __shared__ W warp_entropies[WARPS];
    __shared__ int valid;  // tokens
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int num_tokens = int(router.num_tokens), num_experts = router.num_experts, top_k = router.top_k;
    const int pairs = num_tokens * top_k;
    for (int i = pairs + threadIdx.x; i < (pairs + 3) / 4 * 4; i += 32 * WARPS) keys_of_pairs[i] = NO_EXPERT;
    if (threadIdx.x == 0) valid = 0;
    __syncthreads();

    int span = 1;  // of the lanes that have a choice
    while (span < top_k) span *= 2;
    W entropy = 0;
    for (int t = warp; t < num_tokens; t += WARPS) {
        const int pair = t * top_k + lane;
        int expert = -1;
        W weight = 0;
        if (valid_mask == nullptr || valid_mask[t]) {
            const W* token_logits = logits + int64(t) * num_experts;
            W l[N], q[N];
            load_logits(token_logits, num_experts, l);
            const Normaliser by_logits = softmax(l, q);
            Key keys[N];
            rank_experts(router, l, q, expert_bias, keys);
            expert = choose(keys, top_k, lane, nullptr);
            if (lane >= top_k) expert = -1;
            if (lane == 0) {
                if (!router.sigmoid) entropy += log(by_logits.sum);
                atomicAdd(&valid, 1);
            }
            entropy += entropy_part(router, by_logits, l, q);

            const W logit = expert >= 0 ? token_logits[expert] : minus_infinity();
            const W score = router.sigmoid ? log_sigmoid(logit) : logit;
            if (router.normalise) {
                const W top = warp_max(score, span);
                const W mine = expert >= 0 ? exp(score - top) : W(0);
                weight = mine / warp_sum(mine, span);
            } else {
                weight = router.sigmoid ? sigmoid(logit) : exp(logit - by_logits.top) / by_logits.sum;
            }
            weight *= W(router.scale);
        }
        if (lane < top_k) {
            topk_idx[pair] = expert;
            topk_weights[pair] = weights_of_pairs[pair] = weight;
            keys_of_pairs[pair] = expert < 0 ? NO_EXPERT : uint32(expert * FEW + pair);
        }
    }
    entropy = warp_sum(entropy);
    if (lane == 0) warp_entropies[warp] = entropy;
    __syncthreads();

    if (threadIdx.x == 0) {
        W sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += warp_entropies[w];
        losses[0] = losses[1] = 0;
        losses[2] = valid > 0 ? sum / valid : W(0);
    }
    // of every pair, and of every expert's first
    for (int i = threadIdx.x; i < pairs + num_experts + 1; i += 32 * WARPS) {
        const int e = i - pairs;
        const uint32 key = e < 0 ? keys_of_pairs[i] : uint32(e * FEW);
        int before = 0;
        for (int j = 0; j < pairs; j += 4) {
            const Vector<uint32, 4> others = load_vector<uint32, 4>(keys_of_pairs + j);
#pragma unroll
            for (int k = 0; k < 4; k++) before += others.at[k] < key;
        }
        if (e >= 0) starts[e] = before;
        if (plan.expert_offsets == nullptr) continue;
        if (e >= 0) {
            plan.expert_offsets[e] = before;
            continue;
        }
        plan.token_rows[i] = key == NO_EXPERT ? -1 : before;
        if (key != NO_EXPERT) {
            plan.row_token[before] = i / top_k;
            plan.row_weights[before] = weights_of_pairs[i];
        }
        if (i >= valid * top_k) {  // the tail
            plan.row_token[i] = 0;
            plan.row_weights[i] = 0;
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < num_experts; e += 32 * WARPS) tokens_per_expert[e] = starts[e + 1] - starts[e];
}

// The losses of sums [E + 2] and rows that were added up over ranks. One warp.
extern "C" __global__ void __launch_bounds__(32) router_losses(
    const Router router, const double* sums, const int* tokens_per_expert, W* losses
) {
    after_earlier_kernels();
    write_losses(
        router, sums, tokens_per_expert, sums[router.num_experts], sums[router.num_experts + 1], losses
    );
}

// --- backward ---

// grad += the gradient by x of w = softmax(x), where dw is the one by w.
__device__ __forceinline__ void add_softmax_gradient(const W (&w)[N], const W (&dw)[N], W (&grad)[N]) {
    W mean = 0;
#pragma unroll
    for (int i = 0; i < N; i++) mean += w[i] * dw[i];
    mean = warp_sum(mean);
#pragma unroll
    for (int i = 0; i < N; i++) grad[i] += w[i] * (dw[i] - mean);
}

// dlogits [T, E] of every token, from dp_rows [num_rows] at token_rows. grad_losses may be NULL: zeros.
extern "C" __global__ void __launch_bounds__(32 * BACKWARD_WARPS) route_backward(
    const Router router, const W* logits, const int* topk_idx, const W* topk_weights,
    const int* tokens_per_expert, const int* token_rows, const W* dp_rows, int64 num_rows, const W* grad_losses,
    W* dlogits
) {
    after_earlier_kernels();
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int num_experts = router.num_experts, top_k = router.top_k;
    const W scale = W(router.scale);

    double rows = 0;  // of all ranks: more than an int holds
    int counts[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int e = lane + 32 * i;
        counts[i] = e < num_experts ? tokens_per_expert[e] : 0;
        rows += counts[i];
    }
    const double valid = warp_sum(rows) / top_k;
    double aux_grad = 0, z_grad = 0;
    if (grad_losses != nullptr && valid > 0) {
        // a loss without a coefficient has no gradient, whatever it is multiplied by
        if (router.aux_coeff != 0) aux_grad = grad_losses[0] * router.aux_coeff * num_experts / valid;
        if (router.z_coeff != 0) z_grad = grad_losses[1] * router.z_coeff * 2 / valid;
    }
    W balance[N];  // the aux loss's gradient by q
#pragma unroll
    for (int i = 0; i < N; i++) balance[i] = valid > 0 ? W(aux_grad * (counts[i] / valid)) : W(0);

    // A token's logits, and its slots, one a lane: read while the token before it is worked on.
    struct Token {
        W logits[N];
        int expert, row;
        W weight;
    };
    const auto slot_of = [&](int64 t, int k, Token& out) {
        out.expert = out.row = -1;
        out.weight = 0;
        if (k >= top_k) return;
        out.expert = topk_idx[t * top_k + k];
        out.row = token_rows[t * top_k + k];
        out.weight = topk_weights[t * top_k + k];
    };
    const auto fetch = [&](int64 t, Token& out) {
        load_logits(logits + t * num_experts, num_experts, out.logits);
        slot_of(t, lane, out);
    };
    const int64 step = int64(gridDim.x) * BACKWARD_WARPS;
    int64 t = int64(blockIdx.x) * BACKWARD_WARPS + warp;
    Token ahead = {};
    if (t < router.num_tokens) fetch(t, ahead);
    for (; t < router.num_tokens; t += step) {
        Token token = ahead;
        if (t + step < router.num_tokens) fetch(t + step, ahead);
        W grad[N] = {};
        if (__shfl_sync(ALL_LANES, token.expert, 0) >= 0) {
            const auto& l = token.logits;
            // of the selected: the weight without its scale, and its gradient; from the slot's lane to the expert's
            W w[N] = {}, dw[N] = {};
            for (int first = 0; first < top_k; first += 32) {
                if (first > 0) slot_of(t, first + lane, token);
                const int expert = token.expert < num_experts ? token.expert : -1;
                const bool there = token.row >= 0 && token.row < num_rows;
                const W gradient = there ? dp_rows[token.row] * scale : W(0);
                const W weight = scale != 0 ? token.weight / scale : W(0);
                const int slots = top_k - first < 32 ? top_k - first : 32;
                for (int j = 0; j < slots; j++) {
                    const int e = __shfl_sync(ALL_LANES, expert, j);
                    const W p = __shfl_sync(ALL_LANES, weight, j);
                    const W d = __shfl_sync(ALL_LANES, gradient, j);
#pragma unroll
                    for (int i = 0; i < N; i++) {
                        if (e == lane + 32 * i) {
                            w[i] = p;
                            dw[i] = d;
                        }
                    }
                }
            }

            // scores are a softmax over v: l, or log sigmoid(l)
            if (router.normalise) {
                add_softmax_gradient(w, dw, grad);
            } else if (router.sigmoid) {
                // exp(v), each by itself
#pragma unroll
                for (int i = 0; i < N; i++) grad[i] = dw[i] * sigmoid(l[i]);
            } else {
                softmax(l, w);
                add_softmax_gradient(w, dw, grad);
            }
            if (aux_grad != 0) {
                if (router.sigmoid) {
                    log_sigmoids(l, w);
                    softmax(w, w);
                } else {
                    softmax(l, w);
                }
                add_softmax_gradient(w, balance, grad);
            }
            if (router.sigmoid) {
                // from v to l
#pragma unroll
                for (int i = 0; i < N; i++) grad[i] *= sigmoid(-l[i]);
            }
            if (z_grad != 0) {
                const Normaliser full = softmax(l, w);
                const W by_lse = W(z_grad) * (full.top + log(full.sum));
#pragma unroll
                for (int i = 0; i < N; i++) grad[i] += by_lse * w[i];
            }
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int e = lane + 32 * i;
            if (e < num_experts) dlogits[t * num_experts + e] = grad[i];
        }
    }
}

// dchosen [T, K], the gradient by the chosen experts' logits, where no other logit has one: no loss is asked for, and
// weights are a softmax of the selected, or sigmoids. logits may be NULL where they are a softmax: the weights say all
// that is needed. Each token has a span of a warp's lanes, one for each of its choices, of the first 32.
extern "C" __global__ void __launch_bounds__(32 * BACKWARD_WARPS) route_backward_chosen(
    const Router router, const W* logits, const int* topk_idx, const W* topk_weights, const int* token_rows,
    const W* dp_rows, int64 num_rows, int log_span, W* dchosen
) {
    after_earlier_kernels();
    const int lane = threadIdx.x & 31, span = 1 << log_span, place = lane & (span - 1);
    const int64 warp = blockIdx.x * int64(BACKWARD_WARPS) + threadIdx.x / 32;
    const int64 t = (warp << (5 - log_span)) + (lane >> log_span);
    const int places = t < router.num_tokens ? router.top_k : 0;
    const W scale = W(router.scale);
    const auto for_each = [&](const auto& body) {
#pragma unroll 1
        for (int k = place; k < places; k += span) {
            const int64 slot = t * router.top_k + k;
            const int row = token_rows[slot];
            const W weight = scale != 0 ? topk_weights[slot] / scale : W(0);
            body(slot, weight, row >= 0 && row < num_rows ? dp_rows[row] * scale : W(0));
        }
    };
    W mean = 0;
    if (router.normalise) {
        for_each([&](int64, W weight, W gradient) { mean += weight * gradient; });
        mean = warp_sum(mean, span);
    }
    for_each([&](int64 slot, W weight, W gradient) {
        const int expert = topk_idx[slot];
        W grad = 0;
        if (expert >= 0 && expert < router.num_experts) {
            // by v, of which scores are exp(v): l, or log sigmoid(l)
            const W logit = router.sigmoid ? logits[t * router.num_experts + expert] : W(0);
            grad = router.normalise ? weight * (gradient - mean) : gradient * sigmoid(logit);
            if (router.sigmoid) grad *= sigmoid(-logit);
        }
        dchosen[slot] = grad;
    });
}
