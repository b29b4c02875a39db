// Kernels that are launched one behind the other, without the time between them (sm_90 and newer).
//
// A kernel's blocks come to the multiprocessors when all blocks of the kernel before it have let them or are done, and
// wait there for the end of that; where the launch did not ask for it (launch.pyx) nothing is waited for. Every kernel
// begins with waiting, before it touches memory: each waits for the one before it, and so for all.
#pragma once

__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Says, by one of a block's threads, that blocks of the next kernel may come.
__device__ __forceinline__ void let_later_kernels_come() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// For kernels whose blocks come and go. One whose blocks stay on some multiprocessors, and leaves others to an exchange
// (Space.spared), lets the next come at its end: it would wait on just those others, and keep the exchange from them.
__device__ __forceinline__ void after_earlier_kernels() {
    wait_for_earlier_kernels();
    let_later_kernels_come();
}
