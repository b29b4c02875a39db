// The shared memory that a kernel is launched with.
#pragma once

// Aligned as the swizzle of the copy engine wants it.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
}
