// Keeps blocks that draw their tiles one by one in step.
//
// Tiles that run at the same time share operands in the second-level cache. Blocks that begin theirs at any time ask
// for up to two tiles' worth of them at once, which can be more than fits. So a block begins its n-th tile when all
// others are about to.
#pragma once

#include "types.cuh"

struct Pace {
    uint32* due;  // tiles that are about to begin, of all blocks; zero before the kernel. Null: no pace is kept

    // By one thread of a block: its next tile is about to begin.
    __device__ __forceinline__ void announce() const {
        if (due != nullptr) atomicAdd(due, 1u);
    }
    // Then, before the tile: until the others have come as far. Not all blocks need to be running: who has waited
    // in vain for PATIENCE clocks goes on, and waits no more.
    __device__ __forceinline__ void wait(int tile, int stride, int tiles) {
        constexpr long long PATIENCE = 400000;
        if (due == nullptr) return;
        const uint32 expected = min((tile / stride + 1) * stride, tiles);
        const long long start = clock64();
        while (*const_cast<volatile uint32*>(due) < expected)
            if (clock64() - start > PATIENCE) {
                due = nullptr;
                return;
            }
    }
};
