// Who gets which token when experts are spread over ranks: rank r holds a run of consecutive experts.
//
// A thread takes a token. Its pairs are few, and the rows themselves are moved by permute.cu. Compiled with
// -DW_TYPE= the type of the weights.
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

// ranks [T, most_ranks]: the ranks of each token's kept pairs, each once, in the pairs' order; then -1.
extern "C" __global__ void __launch_bounds__(THREADS) dispatch_ranks(
    const Share share, const int* topk_idx, const int* token_rows, int64 num_tokens, int top_k, int most_ranks,
    int* ranks
) {
    const int64 token = int64(blockIdx.x) * THREADS + threadIdx.x;
    if (token >= num_tokens) return;
    int* mine = ranks + token * most_ranks;
    int held = 0;
    for (int k = 0; k < top_k; k++) {
        if (token_rows[token * top_k + k] < 0) continue;
        const int rank = share.rank_of(topk_idx[token * top_k + k]);
        bool known = false;
        for (int d = 0; d < held; d++) known |= mine[d] == rank;
        if (!known) mine[held++] = rank;
    }
    for (int d = held; d < most_ranks; d++) mine[d] = -1;
}

// Slots [rows, num_slots] of every sent row: the receiver's number of each expert, or -1, and the weight; the
// slot of every pair; and counts [ranks, 2] of rows and pairs by rank. `num_rows` is T * most_ranks.
extern "C" __global__ void __launch_bounds__(THREADS) dispatch_slots(
    const Share share, const int* topk_idx, const W* topk_weights, const int* token_rows,
    const int* expert_offsets, const int* ranks, const int* send_rows, const int* send_offsets,
    int64 num_tokens, int top_k, int most_ranks, int num_slots, int* slot_experts, W* slot_weights,
    int* pair_slots, int* counts
) {
    const int64 thread = int64(blockIdx.x) * THREADS + threadIdx.x;
    if (blockIdx.x == 0) {
        for (int rank = threadIdx.x; rank < share.num_ranks; rank += THREADS) {
            counts[2 * rank] = send_offsets[rank + 1] - send_offsets[rank];
            counts[2 * rank + 1] =
                expert_offsets[share.first_expert(rank + 1)] - expert_offsets[share.first_expert(rank)];
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
        if (at >= send_offsets[share.num_ranks]) clear(at);  // a row that is not sent
        const int row = send_rows[at];
        if (row < 0) continue;
        clear(row);
        const int rank = ranks[at], first = share.first_expert(rank);
        int64 slot = int64(row) * num_slots;
        for (int k = 0; k < top_k; k++) {
            const int64 pair = thread * top_k + k;
            if (token_rows[pair] < 0 || share.rank_of(topk_idx[pair]) != rank) continue;
            pair_slots[pair] = int(slot);
            slot_experts[slot] = topk_idx[pair] - first;
            slot_weights[slot] = topk_weights[pair];
            slot++;
        }
    }
}
