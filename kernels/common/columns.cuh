// The accumulators of mma.sync, rearranged for wide accesses to a row.
#pragma once

#include "types.cuh"

// The four lanes that hold a row of an accumulator fragment hold 2 columns each of every 8: lane q has
// 8 i + 2 q and 8 i + 2 q + 1 of 32 columns in values[2 i] and [2 i + 1]. Afterwards it has columns 8 q to
// 8 q + 7.
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
                const float received = __shfl_xor_sync(0xffffffffu, upper ? low : high, bit);
                (upper ? low : high) = received;
            }
        }
    }
}
