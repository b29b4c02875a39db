// Tiles that the clusters of a grid draw one after the other: who starts late, or shares its multiprocessors with
// another kernel, takes fewer.
//
// A cluster's first tiles are fixed. Further ones are drawn by its first block, ahead of time, and told to both. The
// barriers need no word back: blocks of a cluster that fill the same stages, at least one a tile, cannot be SLOTS
// tiles apart.
#pragma once

#include "cluster.cuh"
#include "mbarrier.cuh"
#include "mma.cuh"
#include "types.cuh"

// AHEAD: tiles that a block's threads want to know of beyond the one they are at.
template <int CLUSTER, int AHEAD> struct Turns {
    static constexpr int FIXED = AHEAD + 1, SLOTS = 4 * AHEAD;

    struct Box {
        uint64 told[SLOTS];
        int tiles[SLOTS];

        // By one thread of the block, before the cluster meets.
        __device__ void init() {
            for (int i = 0; i < SLOTS; ++i) init_barrier(shared_address(told + i), 1);
        }
    };

    Box& box;
    uint32* drawn;  // by all clusters; zero before the kernel
    int tiles;
    bool more = true;  // the last turn that was told has a tile; kept by the thread that draws and tells

    // The tile of a turn, not below `tiles` if there is none. Of these turns only the first may be asked for.
    __device__ __forceinline__ int tile(int turn) const {
        if (turn < FIXED) return int(blockIdx.x / CLUSTER + turn * (gridDim.x / CLUSTER));
        const int slot = (turn - FIXED) % SLOTS;
        wait(shared_address(box.told + slot), (turn - FIXED) / SLOTS % 2);
        return *const_cast<volatile int*>(box.tiles + slot);
    }
    // By one thread of each block: at the begin of a turn's tile, so that nobody waits for the number,
    __device__ __forceinline__ int draw() const {
        if (!more || cluster_rank() > 0) return 0;
        return int(FIXED * (gridDim.x / CLUSTER) + atomicAdd(drawn, 1u));
    }
    // and at its end, with that number, which is told to be the turn's FIXED later.
    __device__ __forceinline__ void tell(int turn, int number) {
        more = more && tile(turn + FIXED - 1) < tiles;
        if (!more) return;
        const int slot = turn % SLOTS;
        const uint32 told = shared_address(box.told + slot), at = shared_address(box.tiles + slot);
        arrive_expecting(told, 4);
        if (cluster_rank() > 0) return;
        for (int block = 0; block < CLUSTER; ++block) store_async(at, number, told, block);
    }
};
