// The stable counting sort that brings slots t*K + k into the order of their experts.
//
// A chunk of slots is a block's: `sort_count` counts each chunk's slots by expert, `sort_place` puts every
// slot in its row. Where an expert keeps its heaviest rows, `sort_place` only orders the slots and
// `sort_select` takes its pick of them.
//
// Compiled with -DW_TYPE= the weights' type (float or double).
#include "common/dynamic_shared.cuh"
#include "common/launch_order.cuh"
#include "common/order.cuh"
#include "common/placement.cuh"
#include "common/types.cuh"
#include "common/warp.cuh"

using W = type_of<W_TYPE>;
using Key = key_of<W>;

constexpr int THREADS = 1024;
constexpr int SELECT_THREADS = 512;

// counts [chunks, E]
extern "C" __global__ void __launch_bounds__(THREADS) sort_count(
    const Slots slots, const int* topk_idx, int* counts
) {
    after_earlier_kernels();
    __shared__ int histogram[MAX_EXPERTS];
    for (int e = threadIdx.x; e < slots.num_experts; e += THREADS) histogram[e] = 0;
    __syncthreads();
    const int64 begin = blockIdx.x * slots.chunk, end = min(begin + slots.chunk, slots.count);
    for (int64 slot = begin + threadIdx.x; slot < end; slot += THREADS) {
        const int e = expert_of(topk_idx, slot, end, slots.num_experts);
        if (e >= 0) atomicAdd(&histogram[e], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < slots.num_experts; e += THREADS) {
        counts[int64(blockIdx.x) * slots.num_experts + e] = histogram[e];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sort_place(
    const Slots slots, const int* topk_idx, const W* topk_weights, const int* counts, const Plan<W> plan
) {
    after_earlier_kernels();
    place_chunk<THREADS>(slots, blockIdx.x, topk_idx, topk_weights, counts, plan, dynamic_shared<8>());
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
    after_earlier_kernels();
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
