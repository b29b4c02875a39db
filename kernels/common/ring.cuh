// A ring of stages in shared memory: one of a block's warpgroups fills them, others multiply what is there.
//
// A stage holds an operand of the block's own and one that is common to the cluster: each of its blocks fetches a part
// of that and sends it to all, so a stage may be filled again when all blocks have released it.
#pragma once

#include "cluster.cuh"
#include "dynamic_shared.cuh"
#include "mbarrier.cuh"
#include "mma.cuh"
#include "types.cuh"
#include "warp.cuh"
#include "wgmma.cuh"

template <int STAGES> struct RingBarriers {
    uint64 full[STAGES];   // a stage's operands have come
    uint64 empty[STAGES];  // they have been multiplied, in all blocks
};

// A place in a ring of stages of so many bytes, the first in shared memory, with RingBarriers<STAGES> at BARRIERS_AT;
// the same for who fills and who reads.
template <int STAGES, int OWN_BYTES, int COMMON_BYTES, int BARRIERS_AT> struct RingOf {
    int stage = 0;
    uint32 parity = 0;  // of the pass through the ring

    // By one thread, before the cluster meets. So many arrivals each tell that a stage is full or empty.
    static __device__ __forceinline__ void init_barriers(int full_arrivals, int empty_arrivals) {
        RingOf at;
        for (at.stage = 0; at.stage < STAGES; ++at.stage) {
            init_barrier(at.full(), full_arrivals);
            init_barrier(at.empty(), empty_arrivals);
        }
        publish_barriers();
    }
    __device__ __forceinline__ void advance() {
        stage = (stage + 1) % STAGES;
        parity ^= stage == 0;
    }
    __device__ __forceinline__ void skip(int steps) {
        stage += steps;
        parity ^= stage / STAGES % 2;
        stage %= STAGES;
    }
    static __device__ __forceinline__ RingBarriers<STAGES>& barriers() {
        return *reinterpret_cast<RingBarriers<STAGES>*>(dynamic_shared<ATOM_BYTES>() + BARRIERS_AT);
    }
    __device__ __forceinline__ uint32 full() const { return shared_address(barriers().full + stage); }
    __device__ __forceinline__ uint32 empty() const { return shared_address(barriers().empty + stage); }
    __device__ __forceinline__ uint32 own() const {
        return shared_address(dynamic_shared<ATOM_BYTES>()) + stage * (OWN_BYTES + COMMON_BYTES);
    }
    __device__ __forceinline__ uint32 common() const { return own() + OWN_BYTES; }
    // where this block's part of the common operand goes, in all blocks
    __device__ __forceinline__ uint32 common_part() const {
        return common() + cluster_rank() * (COMMON_BYTES / CLUSTER);
    }
};

// This warp has read a stage: tells the blocks that fill it.
__device__ __forceinline__ void release(uint32 empty) {
    if (lane() < CLUSTER) arrive(empty, lane());
}

// Leaves the next stages to other warpgroups.
template <class Ring> __device__ __forceinline__ void pass_stages(Ring& ring, int steps) {
    for (int step = 0; step < steps; ++step, ring.advance()) {
        wait(ring.full(), ring.parity);
        __syncwarp();  // the lanes that release must not leave the others phases behind
        release(ring.empty());
    }
}
