// Which block of a grid is the last to get here, and so sees what all of them have written.
#pragma once

#include "common/types.cuh"

// True in all threads of one block. `arrived` must be 0 when the kernel starts; call it once, in all threads.
// The last block must read what others wrote through `fresh`.
__device__ __forceinline__ bool last_block(uint32* arrived) {
    __shared__ bool last;
    __threadfence();  // my block's results come before its arrival
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    __syncthreads();
    if (last) __threadfence();
    return last;
}

// Read past the first-level cache, which other multiprocessors' writes do not reach.
template <class A> __device__ __forceinline__ A fresh(const A* from) {
    return *static_cast<const volatile A*>(from);
}
