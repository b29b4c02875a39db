// What the 32 lanes of a warp work out together. Every lane must take part, and every lane gets the answer.
#pragma once

#include "common/types.cuh"

constexpr uint32 ALL_LANES = 0xffffffffu;

// This thread's, and its warp's in the block.
__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

__device__ __forceinline__ uint32 lower_lanes() { return (1u << (threadIdx.x & 31)) - 1; }

// A number that all lanes have anyway: then the compiler knows it, too, and keeps it once for the warp.
__device__ __forceinline__ int same_in_warp(int x) { return __shfl_sync(ALL_LANES, x, 0); }

// Over each `lanes` lanes, a power of two. The same bits in all of them: x + y and y + x are equal.
template <class A> __device__ __forceinline__ A warp_sum(A x, int lanes = 32) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const A other = __shfl_xor_sync(ALL_LANES, x, distance);
        if (distance < lanes) x += other;
    }
    return x;
}

__device__ __forceinline__ int warp_sum(int x) { return __reduce_add_sync(ALL_LANES, x); }

// Likewise; NaN only where all are.
template <class A> __device__ __forceinline__ A warp_max(A x, int lanes) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const A other = __shfl_xor_sync(ALL_LANES, x, distance);
        if (distance < lanes) x = fmax(x, other);
    }
    return x;
}

__device__ __forceinline__ uint32 warp_max(uint32 x) { return __reduce_max_sync(ALL_LANES, x); }

__device__ __forceinline__ uint64 warp_max(uint64 x) {
    const uint32 high = uint32(x >> 32);
    const uint32 best = warp_max(high);
    return uint64(best) << 32 | warp_max(high == best ? uint32(x) : 0u);
}

__device__ __forceinline__ int warp_min(int x) { return __reduce_min_sync(ALL_LANES, x); }

// The sum over this and the lower lanes.
__device__ __forceinline__ int warp_inclusive_scan(int x) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int below = __shfl_up_sync(ALL_LANES, x, distance);
        if (lane >= distance) x += below;
    }
    return x;
}
