// Who gets which token when experts are spread over ranks: rank r holds a run of consecutive experts.
//
// A rank's tokens may be cut into chunks, runs of about the same length, that cross one after the other. Where a token
// goes is then a number of chunk and rank, chunk * num_ranks + rank, and an expert's number at the receiver is one of
// expert and chunk, expert * chunks + chunk: so both sides' sorts have the rows in the order in which they cross.
//
// A thread takes a token. Its pairs are few, and the rows themselves are moved by permute.cu. Compiled with
// -DW_TYPE= the type of the weights.
#include "common/launch_order.cuh"
#include "common/types.cuh"

using W = type_of<W_TYPE>;

constexpr int THREADS = 256;

// How experts lie on ranks: the first `longer` ranks hold `size + 1`, the others `size`. The same as in
// ffmoe_core/cuda/dispatch.pyx.
struct Share {
    int num_ranks;
    int size;
    int longer;

    __device__ int first_expert(int rank) const { return rank * size + (rank < longer ? rank : longer); }

    __device__ int rank_of(int expert) const {
        const int in_longer = longer * (size + 1);
        return expert < in_longer ? expert / (size + 1) : longer + (expert - in_longer) / size;
    }
};

// The chunk-th chunk is the tokens from T * chunk / chunks on, rounded down.
__device__ int chunk_of(int64 token, int64 num_tokens, int chunks) {
    return int(((token + 1) * chunks - 1) / num_tokens);
}

// ranks [T, most_ranks]: where each token's kept pairs go, each place once, in the pairs' order; then -1.
extern "C" __global__ void __launch_bounds__(THREADS) dispatch_ranks(
    const Share share, const int* topk_idx, const int* token_rows, int64 num_tokens, int top_k, int most_ranks,
    int chunks, int* ranks
) {
    after_earlier_kernels();
    const int64 token = int64(blockIdx.x) * THREADS + threadIdx.x;
    if (token >= num_tokens) return;
    int* mine = ranks + token * most_ranks;
    const int before = chunk_of(token, num_tokens, chunks) * share.num_ranks;
    int held = 0;
    for (int k = 0; k < top_k; k++) {
        if (token_rows[token * top_k + k] < 0) continue;
        const int place = before + share.rank_of(topk_idx[token * top_k + k]);
        bool known = false;
        for (int d = 0; d < held; d++) known |= mine[d] == place;
        if (!known) mine[held++] = place;
    }
    for (int d = held; d < most_ranks; d++) mine[d] = -1;
}

// Slots [rows, num_slots] of every sent row: the receiver's number of each expert, or -1, and the weight; the
// slot of every pair; and counts [ranks, chunks + 1]: a rank's rows by chunk, and its pairs.
extern "C" __global__ void __launch_bounds__(THREADS) dispatch_slots(
    const Share share, const int* topk_idx, const W* topk_weights, const int* token_rows,
    const int* expert_offsets, const int* ranks, const int* send_rows, const int* send_offsets,
    int64 num_tokens, int top_k, int most_ranks, int chunks, int num_slots, int* slot_experts, W* slot_weights,
    int* pair_slots, int* counts
) {
    after_earlier_kernels();
    const int64 thread = int64(blockIdx.x) * THREADS + threadIdx.x;
    if (blockIdx.x == 0) {
        for (int rank = threadIdx.x; rank < share.num_ranks; rank += THREADS) {
            int* mine = counts + rank * (chunks + 1);
            for (int chunk = 0; chunk < chunks; chunk++) {
                const int* from = send_offsets + chunk * share.num_ranks + rank;
                mine[chunk] = from[1] - from[0];
            }
            mine[chunks] = expert_offsets[share.first_expert(rank + 1)] - expert_offsets[share.first_expert(rank)];
        }
    }
    if (thread >= num_tokens) return;
    const auto clear = [&](int64 row) {
        for (int64 s = row * num_slots; s < (row + 1) * num_slots; s++) {
            slot_experts[s] = -1;
            slot_weights[s] = 0;
        }
    };
    for (int k = 0; k < top_k; k++) pair_slots[thread * top_k + k] = -1;
    for (int d = 0; d < most_ranks; d++) {
        const int64 at = thread * most_ranks + d;
        if (at >= send_offsets[chunks * share.num_ranks]) clear(at);  // a row that is not sent
        const int row = send_rows[at];
        if (row < 0) continue;
        clear(row);
        const int rank = ranks[at] % share.num_ranks, chunk = ranks[at] / share.num_ranks;
        const int first = share.first_expert(rank);
        int64 slot = int64(row) * num_slots;
        for (int k = 0; k < top_k; k++) {
            const int64 pair = thread * top_k + k;
            if (token_rows[pair] < 0 || share.rank_of(topk_idx[pair]) != rank) continue;
            pair_slots[pair] = int(slot);
            slot_experts[slot] = (topk_idx[pair] - first) * chunks + chunk;
            slot_weights[slot] = topk_weights[pair];
            slot++;
        }
    }
}
