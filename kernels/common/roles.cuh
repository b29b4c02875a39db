// How the threads of a block share its work: the first warpgroup fetches, the others multiply.
#pragma once

#include "cluster.cuh"
#include "warpgroup.cuh"

// Which of the warpgroups that multiply this thread is in.
__device__ __forceinline__ int consumer() { return threadIdx.x / WARPGROUP - 1; }

// The first warpgroup does fetch_all(), the others multiply_all(), with so many registers a thread. What the arrivals
// are says RingOf::init_barriers.
template <class Ring, int FETCH_REGISTERS, int MULTIPLY_REGISTERS, class Fetch, class Multiply>
__device__ __forceinline__ void share_work(
    int full_arrivals, int empty_arrivals, Fetch fetch_all, Multiply multiply_all
) {
    if (threadIdx.x == WARPGROUP) Ring::init_barriers(full_arrivals, empty_arrivals);
    sync_cluster();
    if (threadIdx.x < WARPGROUP) {
        give_registers<FETCH_REGISTERS>();
        fetch_all();
    } else {
        take_registers<MULTIPLY_REGISTERS>();
        multiply_all();
    }
    sync_cluster();  // a block's shared memory must last until nothing more goes there
}
