// Hands a cluster its tiles one by one: whoever is free takes the next one, so that long tiles and short ones come out
// even. Which cluster computes a tile makes no difference to its bits.
//
// One thread draws for both blocks and sends the number into their shared memory, a good while before it is needed.
#pragma once

#include "cluster.cuh"
#include "cluster_walk.cuh"
#include "mbarrier.cuh"
#include "mma.cuh"
#include "types.cuh"
#include "warp.cuh"

struct TileQueue {
    // How far the blocks of a cluster can be apart is what SLOTS has to be enough for: a number is sent at most two
    // rings of stages and two tiles ahead of the slowest who reads one, and each tile takes a stage at least.
    static constexpr int SLOTS = 16;
    uint64 sent[SLOTS];
    int tiles[SLOTS];

    // By one thread, before the cluster meets.
    __device__ __forceinline__ void init() {
        for (int i = 0; i < SLOTS; ++i) init_barrier(shared_address(sent + i), 1);
    }
    // The block's n-th tile; one from the number of tiles on stands for the end. For threads that have read all earlier
    // ones.
    __device__ __forceinline__ int read(int n) const {
        wait(shared_address(sent + n % SLOTS), n / SLOTS % 2);
        return tiles[n % SLOTS];
    }
};

// What the one thread of each block does that lets tiles come. A cluster's first tile is its own number; then come those
// that nobody has drawn, or where there is no counter every stride-th.
struct TileDrawer {
    int* drawn;  // by all clusters, beside their first; zero before the kernel. Null: none are drawn
    int upcoming = first_tile() - tile_stride();  // less the stride

    // Asks for the next one, which takes its time: a while before it is handed out.
    __device__ __forceinline__ void ask() {
        if (cluster_rank() == 0) upcoming = drawn == nullptr ? upcoming + tile_stride() : atomicAdd(drawn, 1);
    }
    // It is the n-th, which readers may wait for from now on.
    __device__ __forceinline__ void hand_out(TileQueue& queue, int n) {
        const uint32 sent = shared_address(queue.sent + n % TileQueue::SLOTS);
        arrive_expecting(sent, sizeof(int));
        if (cluster_rank() != 0) return;
        for (int block = 0; block < CLUSTER; ++block)
            send(block, shared_address(queue.tiles + n % TileQueue::SLOTS), upcoming + tile_stride(), sent);
    }
};
