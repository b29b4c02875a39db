// The stable counting sort of slots t*K + k by expert, once the slots of every chunk have been counted.
//
// A block places one chunk, a run of slots. It finds for itself where the chunk's rows begin, from the counts
// of all chunks: there are few, and nothing has to wait for one block's answer.
#pragma once

#include "order.cuh"
#include "types.cuh"
#include "warp.cuh"

constexpr int MAX_EXPERTS = 1024;
constexpr int NO_BOUND = 0x7fffffff;

// The same as in ffmoe_core/cuda/placement.pxd, as is Plan.
struct Slots {
    int64 count;  // T * K
    int64 chunk;  // slots of a chunk
    int chunks;
    int top_k;
    int num_experts;
    int capacity;  // the first so many rows of an expert are kept
};

// Where the plan goes. Where an expert keeps its heaviest rows, `order` takes the slots by expert, `keys` the
// order of their weights and `starts` [E + 1] where each expert's begin, for `sort_select`; else it is NULL.
template <class W> struct Plan {
    int* expert_offsets;
    int* row_token;
    W* row_weights;
    int* token_rows;
    int* starts;
    int* order;
    key_of<W>* keys;
};

// The expert of a slot, or -1 where the slot names none.
__device__ __forceinline__ int expert_of(const int* topk_idx, int64 slot, int64 slots, int num_experts) {
    const int e = slot < slots ? topk_idx[slot] : -1;
    return uint32(e) < uint32(num_experts) ? e : -1;
}

// The sum of x over the threads before this one, and the block's `total`.
template <int THREADS> __device__ int block_exclusive_scan(int x, int& total) {
    __shared__ int warp_totals[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int inclusive = warp_inclusive_scan(x);
    __syncthreads();  // an earlier scan's totals have been read
    if (lane == 31) warp_totals[warp] = inclusive;
    __syncthreads();
    const int before = warp_inclusive_scan(lane < THREADS / 32 ? warp_totals[lane] : 0);
    total = __shfl_sync(ALL_LANES, before, 31);
    return __shfl_sync(ALL_LANES, before, warp) - warp_totals[warp] + inclusive - x;
}

// offsets[e] = min(sizes[0], limit) + ... + min(sizes[e - 1], limit) for e from 0 to num_experts; also to
// `copy` unless it is NULL
template <int THREADS>
__device__ void scan_sizes(const int* sizes, int num_experts, int limit, int* offsets, int* copy) {
    int running = 0;
#pragma unroll 1
    for (int first = 0; first < num_experts; first += THREADS) {
        const int e = first + int(threadIdx.x);
        const int size = e < num_experts ? sizes[e] : 0;
        int total;
        const int before = running + block_exclusive_scan<THREADS>(min(size, limit), total);
        if (e < num_experts) {
            offsets[e] = before;
            if (copy != nullptr) copy[e] = before;
        }
        running += total;
    }
    if (threadIdx.x == 0) {
        offsets[num_experts] = running;
        if (copy != nullptr) copy[num_experts] = running;
    }
    __syncthreads();
}

// A step's slots in the order of their experts, on their way to rows.
template <int THREADS, class W> struct Staged {
    static constexpr int STEP = 2 * THREADS;
    int rows[STEP], slots[STEP];
    W weights[STEP];
};

// Every slot of the chunk gets its row, or -1 past the first `capacity` of its expert; with `order`, its
// place there. counts is [chunks, E]; `memory` has room for [THREADS / 32, E] uint16, and for Staged. Call it in all
// threads.
template <int THREADS, class W>
__device__ void place_chunk(
    const Slots& slots, int chunk, const int* topk_idx, const W* topk_weights, const int* counts,
    const Plan<W>& plan, unsigned char* memory
) {
    constexpr int WARPS = THREADS / 32, SLOTS_PER_LANE = 2, STEP = THREADS * SLOTS_PER_LANE;
    __shared__ int ranks[MAX_EXPERTS];        // of the expert's next slot in this chunk
    __shared__ int sizes[MAX_EXPERTS + 1];    // of the expert, all chunks; then where its slots of a step begin
    __shared__ int offsets[MAX_EXPERTS + 1];  // where the expert's rows, or its slots in `order`, begin
    __shared__ int kept;                      // rows of all experts
    uint16* next = reinterpret_cast<uint16*>(memory);
    Staged<THREADS, W>& staged = *reinterpret_cast<Staged<THREADS, W>*>(memory);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, num_experts = slots.num_experts;

    for (int e = threadIdx.x; e < num_experts; e += THREADS) ranks[e] = sizes[e] = 0;
    __syncthreads();
    const int slices = max(1, THREADS / num_experts);
    for (int i = threadIdx.x; i < num_experts * slices; i += THREADS) {
        const int e = i % num_experts;
        int before = 0, all = 0;
#pragma unroll 8
        for (int c = i / num_experts; c < slots.chunks; c += slices) {
            const int count = counts[int64(c) * num_experts + e];
            all += count;
            if (c < chunk) before += count;
        }
        atomicAdd(&ranks[e], before);
        atomicAdd(&sizes[e], all);
    }
    __syncthreads();
    // the first chunk's block tells everyone
    scan_sizes<THREADS>(
        sizes, num_experts, slots.capacity, offsets, chunk == 0 ? plan.expert_offsets : nullptr
    );
    if (threadIdx.x == 0) kept = offsets[num_experts];
    __syncthreads();
    if (plan.order != nullptr)
        scan_sizes<THREADS>(sizes, num_experts, NO_BOUND, offsets, chunk == 0 ? plan.starts : nullptr);

    const int64 begin = chunk * slots.chunk, end = min(begin + slots.chunk, slots.count);
    uint16* mine = next + warp * num_experts;  // the warp's slots of an expert, then the rank of its next one
    for (int64 step = begin; step < end; step += STEP) {
        const int64 first = step + warp * (32 * SLOTS_PER_LANE) + lane;
        for (int e = lane; e < num_experts; e += 32) mine[e] = 0;
        __syncwarp();
        int experts[SLOTS_PER_LANE], places[SLOTS_PER_LANE];
        W weights[SLOTS_PER_LANE];
        uint32 peers[SLOTS_PER_LANE];  // lanes with the same expert
#pragma unroll
        for (int i = 0; i < SLOTS_PER_LANE; i++) {
            const int64 slot = first + 32 * i;
            experts[i] = expert_of(topk_idx, slot, end, num_experts);
            weights[i] = slot < end ? topk_weights[slot] : W(0);
        }
#pragma unroll
        for (int i = 0; i < SLOTS_PER_LANE; i++) {
            peers[i] = __match_any_sync(ALL_LANES, experts[i]);
            places[i] = experts[i] >= 0 ? mine[experts[i]] + __popc(peers[i] & lower_lanes()) : 0;
            __syncwarp();
            if (experts[i] >= 0 && (peers[i] & lower_lanes()) == 0) mine[experts[i]] += __popc(peers[i]);
            __syncwarp();
        }
        __syncthreads();
        for (int e = threadIdx.x; e < num_experts; e += THREADS) {
            int rank = 0;
#pragma unroll
            for (int first_warp = 0; first_warp < WARPS; first_warp += 8) {
                int found[8];  // read before anything is written, or each would wait for the one before
#pragma unroll
                for (int w = 0; w < 8; w++) found[w] = next[(first_warp + w) * num_experts + e];
#pragma unroll
                for (int w = 0; w < 8; w++) {
                    next[(first_warp + w) * num_experts + e] = uint16(rank);
                    rank += found[w];
                }
            }
            sizes[e] = rank;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < SLOTS_PER_LANE; i++) {
            if (experts[i] >= 0) places[i] += mine[experts[i]];
        }
        scan_sizes<THREADS>(sizes, num_experts, NO_BOUND, sizes, nullptr);
        // By expert first, then to memory: neighbours go to neighbouring rows.
#pragma unroll
        for (int i = 0; i < SLOTS_PER_LANE; i++) {
            const int64 slot = first + 32 * i;
            const int e = experts[i];
            int row = -1;
            if (e >= 0) {
                const int rank = ranks[e] + places[i], at = sizes[e] + places[i];
                if (plan.order != nullptr || rank < slots.capacity) row = offsets[e] + rank;
                staged.rows[at] = row;
                staged.slots[at] = int(slot);
                staged.weights[at] = weights[i];
            }
            if (slot < end && (plan.order == nullptr || e < 0)) plan.token_rows[slot] = row;
        }
        __syncthreads();
        for (int at = threadIdx.x; at < sizes[num_experts]; at += THREADS) {
            const int row = staged.rows[at], slot = staged.slots[at];
            if (row < 0) continue;
            if (plan.order != nullptr) {
                plan.order[row] = slot;
                plan.keys[row] = order_key(staged.weights[at]);
            } else {
                plan.row_token[row] = slot / slots.top_k;
                plan.row_weights[row] = staged.weights[at];
            }
        }
        for (int e = threadIdx.x; e < num_experts; e += THREADS) ranks[e] += sizes[e + 1] - sizes[e];
        __syncthreads();
    }

    // this chunk's part of the tail
    for (int64 row = begin + threadIdx.x; row < end; row += THREADS) {
        if (row < kept) continue;
        plan.row_token[row] = 0;
        plan.row_weights[row] = 0;
    }
}
