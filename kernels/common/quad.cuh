// The four lanes that hold a row of a tensor core's sums hold 2 columns each of every 8. Here they exchange
// them, so that each has neighbours enough for an access of 16 bytes.
#pragma once

#include "types.cuh"
#include "warp.cuh"

// Lane q has columns 8 i + 2 q and 8 i + 2 q + 1 of 32 in values[2 i] and [2 i + 1]; afterwards it has columns
// 8 q to 8 q + 7.
__device__ __forceinline__ void gather_columns(float (&values)[8]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = threadIdx.x & bit;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float& low = values[2 * i + j];
                float& high = values[2 * (i + bit) + j];
                const float received = __shfl_xor_sync(ALL_LANES, upper ? low : high, bit);
                (upper ? low : high) = received;
            }
        }
    }
}

// The same for pairs of 16-bit elements: pairs[i] are columns 8 i + 2 q and 8 i + 2 q + 1.
__device__ __forceinline__ void gather_columns(uint32 (&pairs)[4]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = threadIdx.x & bit;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            uint32& low = pairs[i];
            uint32& high = pairs[i + bit];
            const uint32 received = __shfl_xor_sync(ALL_LANES, upper ? low : high, bit);
            (upper ? low : high) = received;
        }
    }
}
