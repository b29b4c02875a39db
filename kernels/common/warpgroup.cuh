// A warpgroup: four warps that multiply together, and hand registers to each other's group (sm_90a).
#pragma once

constexpr int WARPGROUP = 128;  // threads

// All threads of a warpgroup: from now on they have so many registers each, a multiple of 8.
template <int registers> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// So many threads of the block meet here, whole warps of them. There are barriers 1 to 15.
__device__ __forceinline__ void meet_at(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Counts for those who meet there, and goes on.
__device__ __forceinline__ void pass_by(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
