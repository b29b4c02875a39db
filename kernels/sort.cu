// The stable counting sort that brings slots t*K + k into the order of their experts.
//
// A chunk of slots is a block's: `sort_count` counts each chunk's slots by expert, `sort_scan` turns the
// counts into where the chunk's rows begin, `sort_place` puts every slot in its row. A single chunk needs
// `sort_place` alone. Where an expert keeps its heaviest rows, `sort_place` only orders the slots and
// `sort_select` takes its pick of them.
//
// Compiled with -DW_TYPE= the weights' type (float or double).
#include "common/arrival.cuh"
#include "common/order.cuh"
#include "common/types.cuh"
#include "common/warp.cuh"

using W = type_of<W_TYPE>;
using Key = key_of<W>;

constexpr int MAX_EXPERTS = 1024;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int SLOTS_PER_LANE = 8;
constexpr int CHUNK = THREADS * SLOTS_PER_LANE;  // the same as in ffmoe_core/cuda/permute.pyx
constexpr int SELECT_THREADS = 512;

// The expert of a slot, or -1 where the slot names none.
__device__ __forceinline__ int expert_of(const int* topk_idx, int64 slot, int64 slots, int num_experts) {
    const int e = slot < slots ? topk_idx[slot] : -1;
    return uint32(e) < uint32(num_experts) ? e : -1;
}

// counts [E, chunks]
extern "C" __global__ void __launch_bounds__(THREADS) sort_count(
    const int* topk_idx, int64 slots, int num_experts, int* counts, uint32* arrived
) {
    __shared__ int histogram[MAX_EXPERTS];
    for (int e = threadIdx.x; e < num_experts; e += THREADS) histogram[e] = 0;
    __syncthreads();
    const int64 first = int64(blockIdx.x) * CHUNK + threadIdx.x;
#pragma unroll
    for (int i = 0; i < SLOTS_PER_LANE; i++) {
        const int e = expert_of(topk_idx, first + i * THREADS, slots, num_experts);
        if (e >= 0) atomicAdd(&histogram[e], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < num_experts; e += THREADS) {
        counts[int64(e) * gridDim.x + blockIdx.x] = histogram[e];
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *arrived = 0;
}

// The sum of x over the threads before this one, and the block's `total`.
__device__ int block_exclusive_scan(int x, int& total) {
    __shared__ int warp_totals[WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int inclusive = warp_inclusive_scan(x);
    __syncthreads();  // an earlier scan's totals have been read
    if (lane == 31) warp_totals[warp] = inclusive;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w == warp) before = total;
        total += warp_totals[w];
    }
    return before + inclusive - x;
}

// offsets[e] = min(sizes[0], limit) + ... + min(sizes[e - 1], limit) for e from 0 to num_experts
__device__ void scan_sizes(const int* sizes, int num_experts, int limit, int* offsets) {
    int running = 0;
    for (int first = 0; first < num_experts; first += THREADS) {
        const int e = first + threadIdx.x;
        const int size = e < num_experts ? fresh(sizes + e) : 0;
        int total;
        const int before = block_exclusive_scan(size < limit ? size : limit, total);
        if (e < num_experts) offsets[e] = running + before;
        running += total;
    }
    if (threadIdx.x == 0) offsets[num_experts] = running;
}

// A block takes an expert: counts[e, c] becomes the number of its rows in chunks before c, sizes[e] that of
// all its rows. The last block makes expert_offsets from what `capacity` leaves of each and, unless it is
// NULL, starts [E + 1] from all rows.
extern "C" __global__ void __launch_bounds__(THREADS) sort_scan(
    int* counts, int chunks, int num_experts, int capacity, int* sizes, int* expert_offsets, int* starts,
    uint32* arrived
) {
    int* mine = counts + int64(blockIdx.x) * chunks;
    int running = 0;
    for (int first = 0; first < chunks; first += THREADS) {
        const int c = first + threadIdx.x;
        int total;
        const int before = block_exclusive_scan(c < chunks ? mine[c] : 0, total);
        if (c < chunks) mine[c] = running + before;
        running += total;
    }
    if (threadIdx.x == 0) sizes[blockIdx.x] = running;
    if (!last_block(arrived)) return;
    scan_sizes(sizes, num_experts, capacity, expert_offsets);
    if (starts != nullptr) scan_sizes(sizes, num_experts, 0x7fffffff, starts);
}

// Without `order` every slot gets its row, or -1 past the first `capacity` of its expert. With it, `order`
// takes the slots by expert and `keys` the order of their weights, for `sort_select`. Without `counts` this
// is the only chunk, and makes expert_offsets and starts itself.
extern "C" __global__ void __launch_bounds__(THREADS) sort_place(
    const int* topk_idx, const W* topk_weights, int64 slots, int top_k, int num_experts, int capacity,
    const int* counts, int* expert_offsets, int* row_token, W* row_weights, int* token_rows,
    int* starts, int* order, Key* keys
) {
    __shared__ int next[WARPS][MAX_EXPERTS];  // the warp's rows of an expert, then the rank of its next one
    __shared__ int sizes[MAX_EXPERTS];        // of the only chunk
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int64 chunk = int64(blockIdx.x) * CHUNK;
    const int64 first = chunk + warp * (32 * SLOTS_PER_LANE) + lane;
    for (int e = lane; e < num_experts; e += 32) next[warp][e] = 0;
    __syncwarp();

    int experts[SLOTS_PER_LANE];
    uint32 peers[SLOTS_PER_LANE];  // lanes with the same expert
#pragma unroll
    for (int i = 0; i < SLOTS_PER_LANE; i++) {
        experts[i] = expert_of(topk_idx, first + 32 * i, slots, num_experts);
    }
#pragma unroll
    for (int i = 0; i < SLOTS_PER_LANE; i++) {
        peers[i] = __match_any_sync(ALL_LANES, experts[i]);
        if (experts[i] >= 0 && (peers[i] & lower_lanes()) == 0) next[warp][experts[i]] += __popc(peers[i]);
        __syncwarp();
    }
    __syncthreads();
    for (int e = threadIdx.x; e < num_experts; e += THREADS) {
        int rank = counts != nullptr ? counts[int64(e) * gridDim.x + blockIdx.x] : 0;
        for (int w = 0; w < WARPS; w++) {
            const int size = next[w][e];
            next[w][e] = rank;
            rank += size;
        }
        sizes[e] = rank;
    }
    __syncthreads();
    if (counts == nullptr) {
        scan_sizes(sizes, num_experts, capacity, expert_offsets);
        if (starts != nullptr) scan_sizes(sizes, num_experts, 0x7fffffff, starts);
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < SLOTS_PER_LANE; i++) {
        const int64 slot = first + 32 * i;
        const int e = experts[i];
        const int rank = e >= 0 ? next[warp][e] + __popc(peers[i] & lower_lanes()) : 0;
        __syncwarp();
        if (e >= 0 && (peers[i] & lower_lanes()) == 0) next[warp][e] = rank + __popc(peers[i]);
        __syncwarp();
        if (slot >= slots) continue;
        if (e < 0) {
            token_rows[slot] = -1;
        } else if (order != nullptr) {
            order[starts[e] + rank] = int(slot);
            keys[starts[e] + rank] = order_key(topk_weights[slot]);
        } else if (rank < capacity) {
            const int row = expert_offsets[e] + rank;
            token_rows[slot] = row;
            row_token[row] = int(slot) / top_k;
            row_weights[row] = topk_weights[slot];
        } else {
            token_rows[slot] = -1;
        }
    }

    // this chunk's part of the tail
    const int64 rows = expert_offsets[num_experts];
    for (int64 row = chunk + threadIdx.x; row < chunk + CHUNK && row < slots; row += THREADS) {
        if (row < rows) continue;
        row_token[row] = 0;
        row_weights[row] = 0;
    }
}

// --- the heaviest rows of an expert ---

struct Threshold {
    Key key;   // every greater key is kept
    int ties;  // and so many equal ones
};

// The threshold that keeps `count` of n keys: radix selection, 8 bits at a time from the top.
__device__ Threshold find_threshold(const Key* keys, int n, int count) {
    __shared__ int histogram[256];
    __shared__ Threshold found;
    const int lane = threadIdx.x & 31;
    Key known = 0;  // the bits of the threshold above `shift`
    int wanted = count;
    for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
        for (int digit = threadIdx.x; digit < 256; digit += SELECT_THREADS) histogram[digit] = 0;
        __syncthreads();
        for (int first = 0; first < n; first += SELECT_THREADS) {
            const int i = first + threadIdx.x;
            int digit = -1;
            if (i < n) {
                const Key key = keys[i];
                // two shifts: by the key's whole width would be undefined
                if (key >> shift >> 8 == known >> shift >> 8) digit = int(key >> shift & 255);
            }
            const uint32 peers = __match_any_sync(ALL_LANES, digit);
            if (digit >= 0 && (peers & lower_lanes()) == 0) atomicAdd(&histogram[digit], __popc(peers));
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            // lane i has the digits 255 - 8i and the 7 below; the first lane to reach `wanted` has the digit
            int mine = 0;
            for (int j = 0; j < 8; j++) mine += histogram[255 - 8 * lane - j];
            const int inclusive = warp_inclusive_scan(mine);
            const uint32 reached = __ballot_sync(ALL_LANES, inclusive >= wanted);
            if (lane == __ffs(reached) - 1) {
                int left = wanted - (inclusive - mine);
                int digit = 255 - 8 * lane;
                while (histogram[digit] < left) left -= histogram[digit--];
                found.key = known | Key(digit) << shift;
                found.ties = left;
            }
        }
        __syncthreads();
        known = found.key;
        wanted = found.ties;
    }
    return {known, wanted};
}

// A block takes an expert: of its slots, order[starts[e]:starts[e + 1]], as many as it has rows, the heaviest
// and of equals the earlier, in the order they stand in.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS) sort_select(
    const W* topk_weights, int top_k, const int* starts, const int* order, const Key* keys,
    const int* expert_offsets, int* row_token, W* row_weights, int* token_rows
) {
    constexpr int SELECT_WARPS = SELECT_THREADS / 32;
    __shared__ int warp_greater[SELECT_WARPS], warp_equal[SELECT_WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int start = starts[blockIdx.x], size = starts[blockIdx.x + 1] - start;
    const int row0 = expert_offsets[blockIdx.x], kept = expert_offsets[blockIdx.x + 1] - row0;
    Threshold threshold = {0, 0};  // below every key: all are kept
    if (kept < size) threshold = find_threshold(keys + start, size, kept);

    int greater_before = 0, equal_before = 0;
    for (int first = 0; first < size; first += SELECT_THREADS) {
        const int i = first + threadIdx.x;
        const Key key = i < size ? keys[start + i] : 0;
        const bool greater = i < size && key > threshold.key;
        const bool equal = i < size && key == threshold.key;
        const uint32 greater_lanes = __ballot_sync(ALL_LANES, greater);
        const uint32 equal_lanes = __ballot_sync(ALL_LANES, equal);
        if (lane == 0) {
            warp_greater[warp] = __popc(greater_lanes);
            warp_equal[warp] = __popc(equal_lanes);
        }
        __syncthreads();
        int greater_rank = greater_before + __popc(greater_lanes & lower_lanes());
        int equal_rank = equal_before + __popc(equal_lanes & lower_lanes());
        for (int w = 0; w < SELECT_WARPS; w++) {
            if (w < warp) {
                greater_rank += warp_greater[w];
                equal_rank += warp_equal[w];
            }
            greater_before += warp_greater[w];
            equal_before += warp_equal[w];
        }
        __syncthreads();  // the counts have been read
        if (i >= size) continue;
        const int slot = order[start + i];
        if (greater || (equal && equal_rank < threshold.ties)) {
            const int row = row0 + greater_rank + (equal_rank < threshold.ties ? equal_rank : threshold.ties);
            token_rows[slot] = row;
            row_token[row] = slot / top_k;
            row_weights[row] = topk_weights[slot];
        } else {
            token_rows[slot] = -1;
        }
    }
}
