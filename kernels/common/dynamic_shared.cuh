// The shared memory that a kernel is launched with.
#pragma once

template <int alignment> __device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(alignment) unsigned char memory[];
    return memory;
}
